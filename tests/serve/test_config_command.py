"""`fastchat config show`, and a `fastchat serve` that obeys its file."""

from __future__ import annotations

import json
import sys
import tomllib
import urllib.error
import urllib.request

import pytest

from tests.processes import ServerProcess, run_command


@pytest.fixture
def show(tmp_path):
    """Run `fastchat config show` with a file in the usual place."""
    folder = tmp_path / "config" / "fastchat"
    folder.mkdir(parents=True)

    def run(text, *flags, **environment):
        (folder / "config.toml").write_text(text)
        there = {"XDG_CONFIG_HOME": str(tmp_path / "config"), **environment}
        return run_command("config_command", "show", *flags, state_dir=tmp_path, environment=there)

    return run


def test_every_value_is_shown_with_its_origin_and_no_secret(show, tmp_path):
    """What it prints is TOML; keys are masked wherever they come from."""
    text = 'port = 8123\napi-keys = ["sk-very-secret"]\n[[models]]\npath = "/m/a"\nnames = ["a"]\n'
    ended = show(text, "--seed", "4", FASTCHAT_DRAIN_TIMEOUT="5")
    assert ended.returncode == 0
    lines = {line.partition(" =")[0]: line for line in ended.stdout.splitlines()}
    file = tmp_path / "config" / "fastchat" / "config.toml"
    assert lines["port"].endswith(f"# file {file}")
    assert lines["seed"].endswith("# flag")
    assert lines["drain-timeout"].endswith("# environment FASTCHAT_DRAIN_TIMEOUT")
    assert lines["host"].endswith("# default")
    document = tomllib.loads(ended.stdout)
    assert (document["port"], document["api-keys"], document["models"]) == (
        8123,
        "***",
        [{"path": "/m/a", "names": ["a"]}],
    )
    assert "sk-very-secret" not in ended.stdout + ended.stderr


def test_what_it_prints_is_a_configuration_file_to_begin_with(show):
    """Saved, it is obeyed and says the same; nothing of the default needs taking out."""
    first = show("")
    again = show(first.stdout)
    assert (again.returncode, again.stderr) == (0, "")
    assert tomllib.loads(again.stdout) == tomllib.loads(first.stdout)
    assert tomllib.loads(first.stdout)["no-web"] is False


def test_json_has_the_same(show):
    """For programs."""
    shown = json.loads(show("port = 1", "--json").stdout)
    assert shown["port"]["value"] == 1
    assert shown["port"]["origin"].startswith("file ")
    assert shown["models"] == {"value": [], "origin": "default"}


@pytest.mark.parametrize("command", ["config_command", "launch"])
def test_mistake_in_the_file_ends_either_command_with_78(show, tmp_path, command):
    """One line that names the file and what to write."""
    assert show("prot = 1").returncode == 78
    flags = ["show"] if command == "config_command" else []
    there = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    ended = run_command(command, *flags, state_dir=tmp_path, environment=there)
    assert ended.returncode == 78
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith("config.toml: prot is not a setting; did you mean port?")


def test_serve_obeys_its_file_and_shows_keys_to_nobody(model_folder, tmp_path):
    """Models, ports and keys from one file; the keys are on no command line of what it starts."""
    file = tmp_path / "serve.toml"
    file.write_text(
        'port = 0\ncontroller-port = 0\nworker-port = 0\nweb-port = 0\napi-keys = ["sk-from-the-file"]\n'
        f'[[models]]\npath = "{model_folder}"\nnames = ["named-here"]\n'
    )
    command = [sys.executable, "-m", "fastchat", "serve", "--config", file]
    environment = {"FASTCHAT_STATE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "FASTCHAT_STREAM_INTERVAL": "3"}
    with ServerProcess(command, environment=environment) as serving:
        url = serving.wait_for_line(r"export OPENAI_BASE_URL=(\S+)/v1$")[1]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"{url}/v1/models", timeout=60)
        request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": "Bearer sk-from-the-file"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert [card["id"] for card in json.load(answer)["data"]] == ["named-here"]
        lines = command_lines_of(serving.pid)
        assert any("--stream-interval=3" in line for line in lines)
        assert not any("sk-from-the-file" in line for line in lines)
        assert "sk-from-the-file" not in serving.log


def command_lines_of(pid):
    import psutil

    return [" ".join(child.cmdline()) for child in psutil.Process(pid).children(recursive=True)]
