"""`--log-level`: of every server, and handed on by `fastchat serve`."""

from __future__ import annotations

import socket
import time

import pytest

from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import log_level
from fastchat.serve.controller import create_controller_parser
from fastchat.serve.gradio_web_server import create_page_parser
from fastchat.serve.launch import Ports, create_serve_parser, process_specs
from fastchat.serve.model_worker import create_model_worker_parser
from fastchat.serve.openai_api_server import create_api_server_parser
from fastchat.worker.engine_factory import EnginePlan
from fastchat.worker.engine_process import engine_command
from tests.processes import START_LIMIT_S, free_port, run_command, start_command
from tests.serve.test_launch import WORKER

LEVELS = [([], "INFO"), (["--log-level", "warning"], "WARNING"), (["--log-level", "debug"], "DEBUG")]


@pytest.mark.parametrize("make", [create_controller_parser, create_page_parser, create_api_server_parser])
@pytest.mark.parametrize(("flags", "level"), LEVELS)
def test_every_server_has_the_flag(make, flags, level):
    assert log_level(make().parse_args(flags)) == level


@pytest.mark.parametrize("flags", [["--log-level", "debug"], ["--debug"]])
def test_serve_hands_the_level_on_to_all_that_it_starts(flags):
    """FastChat's `--debug` is the level debug, for all of them too."""
    arguments = create_serve_parser().parse_args(flags)
    specs = process_specs(arguments, (WORKER,), Ports(api=1, controller=2, workers=(3,), web=4))
    for spec in specs:
        assert {"--log-level=debug", "--debug=true"} & set(spec.command()), spec.name


@pytest.mark.parametrize(("word", "level"), [("true", "DEBUG"), ("1", "DEBUG"), ("False", "INFO"), ("0", "INFO")])
def test_the_word_behind_debug_is_obeyed(word, level):
    """As in a file and in the environment; another word is refused."""
    assert log_level(create_model_worker_parser().parse_args(["--model-path", "m", "--debug", word])) == level
    with pytest.raises(SystemExit):
        create_model_worker_parser().parse_args(["--model-path", "m", "--debug", f"{word}ly"])


def test_an_engine_in_a_process_of_its_own_logs_what_its_worker_logs():
    configure_logging("worker", level="ERROR")
    plan = EnginePlan(
        path="model",
        device="cpu",
        dtype="float32",
        quantization=None,
        max_context=1,
        max_batch_tokens=1,
        max_running=1,
        kv_cache_bytes=1,
    )
    assert engine_command(plan)[-2:] == ["--log-level", "ERROR"]


def wait_until_it_listens(port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=START_LIMIT_S).close()
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        else:
            return


@pytest.mark.parametrize(("level", "is_told"), [("info", True), ("error", False)])
def test_a_level_keeps_what_is_below_it_out_of_the_log(tmp_path, level, is_told):
    port = free_port()
    with start_command("controller", "--port", str(port), "--log-level", level, state_dir=tmp_path) as process:
        wait_until_it_listens(port)
    assert ("INFO" in process.log) == is_told


def test_the_level_comes_from_file_and_environment_too(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('log-level = "loud"\n')
    refused = run_command("config_command", "show", "--config", file, state_dir=tmp_path)
    assert refused.returncode == 78
    assert "log-level" in refused.stderr
    file.write_text('log-level = "warning"\n')
    shown = run_command("config_command", "show", "--config", file, state_dir=tmp_path)
    assert 'log-level = "warning"' in shown.stdout
