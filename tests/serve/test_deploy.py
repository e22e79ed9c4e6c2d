"""The files in deploy/ cannot be run in a test; what they say about our commands can be checked."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest
import yaml

from fastchat.serve.arguments import DEFAULT_DRAIN_S
from fastchat.serve.launch import create_serve_parser
from fastchat.supervisor.supervisor import STOP_MARGIN_S
from tests.processes import ROOT

DEPLOY = ROOT / "deploy"
NUM_RANKS = 3
STOP_LIMIT_S = DEFAULT_DRAIN_S + STOP_MARGIN_S


@pytest.fixture(scope="module")
def unit():
    """Every setting of the unit's lines, the last one of each name."""
    lines = (DEPLOY / "fastchat.service").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


@pytest.fixture(scope="module")
def service():
    """The service of the compose file."""
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["fastchat"]


def test_unit_starts_our_command_and_outwaits_an_orderly_stop(unit):
    """systemd must not lose patience before the supervisor has asked every process in turn."""
    program, command, flags = shlex.split(unit["ExecStart"])
    assert (program.rpartition("/")[2], command, flags) == ("fastchat", "serve", "$FASTCHAT_FLAGS")
    assert (unit["Type"], unit["KillMode"], unit["RestartPreventExitStatus"]) == ("notify", "mixed", "2 78")
    assert int(unit["TimeoutStopSec"]) > NUM_RANKS * STOP_LIMIT_S


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_unit_is_one_that_systemd_understands(tmp_path):
    """Every setting is known and has a value of its kind."""
    text = (DEPLOY / "fastchat.service").read_text().replace("/opt/fastchat/bin/fastchat", "/bin/true")
    file = tmp_path / "fastchat.service"
    file.write_text(text)
    ended = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_compose_file_runs_our_command(service):
    """Its flags are ours, its port is the API server's, and it waits for an orderly stop."""
    command, *flags = service["command"]
    assert command == "serve"
    arguments = create_serve_parser().parse_args(flags)
    assert service["ports"] == [f"127.0.0.1:{arguments.port}:{arguments.port}"]
    assert int(service["stop_grace_period"].removesuffix("s")) > NUM_RANKS * STOP_LIMIT_S
    assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_image_runs_our_command_as_nobody_special():
    """Not as root, with a health check of the port that is served."""
    text = (DEPLOY / "Dockerfile").read_text()
    command, *flags = json.loads(re.search(r"^CMD (\[.*\])$", text, re.MULTILINE)[1])
    arguments = create_serve_parser().parse_args(flags)
    assert (command, arguments.host) == ("serve", "0.0.0.0")
    assert f"127.0.0.1:{arguments.port}/health" in text
    assert int(re.search(r"^USER (\d+)$", text, re.MULTILINE)[1]) > 0


def test_image_is_built_from_files_that_exist_with_the_torch_of_the_package():
    """Nothing is copied that the ignore file leaves out."""
    text = (DEPLOY / "Dockerfile").read_text()
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for word in line.split()]
    assert copied
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)
    assert re.search(r"torch==\S+", text)[0] in (ROOT / "pyproject.toml").read_text()
