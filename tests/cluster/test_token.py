"""Laws of the cluster token."""

from __future__ import annotations

import stat
import subprocess
import sys

import pytest

from fastchat.cluster.token import TOKEN_FILE_NAME, is_cluster_token, load_cluster_token, read_token_file
from fastchat.config import Environment
from fastchat.errors import ConfigError
from tests.processes import process_environment

PRINT_TOKEN = """
import sys
from fastchat.cluster.token import load_cluster_token
sys.stdin.readline()
print(load_cluster_token())
"""


def test_processes_that_start_at_once_share_one_token(tmp_path):
    """Whoever loses the race to create the file reads it; the file is its owner's alone and no draft stays."""
    environment = process_environment({"FASTCHAT_STATE_DIR": str(tmp_path / "deep" / "state")})
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", PRINT_TOKEN],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    tokens = {racer.communicate(timeout=60)[0].strip() for racer in racers}
    assert len(tokens) == 1
    assert len(tokens.pop()) >= 40
    (file,) = (tmp_path / "deep" / "state").iterdir()
    assert file.name == TOKEN_FILE_NAME
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_explicit_beats_environment_beats_file(tmp_path):
    """Flag > environment > file."""
    in_file = load_cluster_token(environment=Environment(state_dir=tmp_path))
    environment = Environment(state_dir=tmp_path, cluster_token="from-the-environment")
    assert load_cluster_token(environment=environment) == "from-the-environment"
    assert load_cluster_token("from-an-explicit-flag", environment=environment) == "from-an-explicit-flag"
    assert load_cluster_token(environment=Environment(state_dir=tmp_path)) == in_file


@pytest.mark.parametrize("token", ["", "short", "two words in one token", "ünicode-is-not-allowed", "x" * 600])
def test_unusable_token_is_refused_without_being_shown(token, tmp_path):
    """The message names the source, never the secret."""
    with pytest.raises(ConfigError) as caught:
        load_cluster_token(token, environment=Environment(state_dir=tmp_path))
    assert not token or token not in caught.value.message


def test_token_file_of_the_operator_is_read_or_refused(tmp_path):
    """--cluster-token-file."""
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match=str(path)):
        read_token_file(path)
    path.write_text("a-token-of-the-operator\n")
    assert read_token_file(path) == "a-token-of-the-operator"


def test_state_directory_that_cannot_be_made_is_one_line(tmp_path):
    """A file where the directory should be."""
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match="FASTCHAT_STATE_DIR"):
        load_cluster_token(environment=Environment(state_dir=tmp_path / "state" / "deeper"))


def test_only_the_token_itself_is_the_token():
    """Neither a prefix, nor odd characters, nor nothing."""
    assert is_cluster_token("secret-secret-secret", "secret-secret-secret")
    for wrong in ("", "secret-secret-secre", "secret-secret-secret ", "\udce9", "' OR 1=1--"):
        assert not is_cluster_token("secret-secret-secret", wrong)
