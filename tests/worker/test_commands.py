"""`model_worker` and `multi_model_worker` as people type them."""

import os
import signal
from pathlib import Path

import httpx2
import pytest

from fastchat.errors import ConfigError
from fastchat.serve.model_worker import create_model_worker_parser
from fastchat.serve.multi_model_worker import create_multi_model_worker_parser, model_specs
from fastchat.serve.worker_arguments import obey_early_flags, worker_config
from fastchat.worker.config import ModelSpec
from tests.checkpoints import write_checkpoint
from tests.processes import run_command, start_command


def test_guides_multi_model_command(checkpoints, tmp_path):
    """Each path with its names; the log has the lines that scripts wait for; SIGTERM is an orderly end."""
    flags = []
    for name, folder in checkpoints.items():
        flags += ["--model-path", f"{folder}/", "--model-names", name]
    with start_command(
        "multi_model_worker", *flags, "--port", "0", "--no-register", "--dtype", "float32", state_dir=tmp_path
    ) as process:
        url = process.url
        process.wait_for_line(r"args: Namespace\(")
        token = (tmp_path / "cluster-token").read_text().strip()
        cards = httpx2.get(f"{url}/v1/models", headers={"authorization": f"Bearer {token}"}, timeout=60).json()
        assert [card["id"] for card in cards["data"]] == ["chatglm2-6b", "qwen"]
        process.wait_for_line("worker ready")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
        assert token not in process.log


@pytest.mark.parametrize(
    ("flags", "form"),
    [(["--load-8bit"], "int8"), (["--quantize", "int4", "--quantize-group-size", "32"], "int4")],
    ids=str,
)
def test_quantized_models_answer_from_a_process_of_their_own(tmp_path, flags, form):
    """The flags reach the engine's process; the log says in which form the weights are held."""
    folder = write_checkpoint(tmp_path / "chatglm2-6b", "chatglm2")
    flags = ["--model-path", folder, "--port", "0", "--no-register", "--engine-process", "process", *flags]
    with start_command("model_worker", *flags, state_dir=tmp_path) as process:
        process.wait_for_line("worker ready")
        process.wait_for_line(f"dtype={form}")
        token = (tmp_path / "cluster-token").read_text().strip()
        body = {"model": "chatglm2-6b", "prompt": "你好", "max_tokens": 3}
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx2.post(f"{process.url}/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantize", "int3"], "invalid choice"),
        (["--quantize", "int4", "--quantize-group-size", "100"], "invalid choice"),
        (["--gptq-ckpt", "x.pt"], "--gptq-ckpt is not supported"),
        (["--awq-wbits", "4"], "--awq-wbits is not supported"),
        (["--enable-exllama"], "--enable-exllama is not supported"),
        (["--xft-dtype", "bf16"], "--xft-dtype is not supported"),
        (["--cpu-offloading"], "--cpu-offloading is not supported"),
        (["--limit-worker", "0"], "not a whole number"),
        (["--device", "xpu"], "invalid choice"),
    ],
    ids=str,
)
def test_refused_flags_end_in_one_line(flags, words, capsys):
    """What cannot be obeyed is told with what to do instead, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        create_model_worker_parser().parse_args(["--model-path", "x", *flags])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flags", [["--num-gpus", "2"], ["--revision", "v1"], ["--gpus", "0,1"]], ids=str)
def test_flags_whose_feature_is_absent_are_refused(flags):
    """Before anything is loaded."""
    with pytest.raises(ConfigError, match=flags[0]):
        obey_early_flags(create_model_worker_parser().parse_args(["--model-path", "x", *flags]))


def test_missing_folder_and_taken_port_end_in_one_line(tmp_path, checkpoints):
    """No traceback; the exit code says which kind."""
    missing = run_command("model_worker", "--model-path", tmp_path / "none", "--port", "0", state_dir=tmp_path)
    assert missing.returncode == 2
    assert missing.stderr.splitlines()[-1].startswith("error: ")
    assert "no such folder" in missing.stderr.splitlines()[-1]
    assert "Traceback" not in missing.stderr
    with start_command(
        "model_worker", "--model-path", checkpoints["qwen"], "--port", "0", "--no-register", state_dir=tmp_path
    ) as process:
        port = process.port
        taken = run_command(
            "model_worker", "--model-path", checkpoints["qwen"], "--port", str(port), state_dir=tmp_path
        )
        assert taken.returncode == 69
        assert f"port {port}" in taken.stderr.splitlines()[-1]


def test_a_worker_whose_engine_dies_ends_with_a_failures_exit_code(checkpoints, tmp_path):
    """So that whatever runs it starts it again; the last line says what happened."""
    flags = ["--model-path", checkpoints["qwen"], "--port", "0", "--no-register", "--engine-process", "process"]
    with start_command("model_worker", *flags, state_dir=tmp_path) as process:
        process.wait_for_line("worker ready")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait() == 1
        assert "an engine died; this worker ends" in process.log
        assert process.log.splitlines()[-1].startswith("error: an engine died")


def test_unique_prefixes_of_flags_work():
    """As FastChat's users write them."""
    arguments = create_model_worker_parser().parse_args(
        ["--model-path", "x", "--model-name", "a, b", "--controller", "http://h:1", "--worker", "http://h:2", "--embed"]
    )
    assert arguments.model_names == ("a", "b")
    assert (arguments.controller_address, arguments.worker_address) == ("http://h:1", "http://h:2")
    assert arguments.embed_in_truncate


def test_names_and_templates_belong_to_their_paths():
    """One template serves all; a wrong number of names is refused."""
    parser = create_multi_model_worker_parser()
    base = ["--model-path", "/a", "--model-path", "/b"]
    specs = model_specs(parser.parse_args([*base, "--conv-template", "t"]))
    assert [(str(spec.path), spec.names, spec.conv_template) for spec in specs] == [("/a", (), "t"), ("/b", (), "t")]
    named = model_specs(parser.parse_args([*base, "--model-names", "a,x", "--model-names", "b"]))
    assert [spec.names for spec in named] == [("a", "x"), ("b",)]
    for flags in (["--model-names", "a"], ["--conv-template", "t"] * 3):
        with pytest.raises(ConfigError, match=flags[0]):
            model_specs(parser.parse_args([*base, *flags]))


def test_flags_become_the_workers_config(tmp_path, monkeypatch):
    """Every flag that is offered arrives; the address follows from host and port."""
    monkeypatch.setenv("FASTCHAT_STATE_DIR", str(tmp_path))
    from fastchat.config import read_environment
    from fastchat.serve.http_server import bind_listeners

    listeners = bind_listeners("127.0.0.1", 0)
    flags = ["--limit-worker-concurrency", "5", "--stream-interval", "2", "--seed", "3", "--max-gpu-memory", "2GiB"]
    flags += ["--kv-cache-memory", "1MiB", "--max-context", "64", "--max-batch-tokens", "32", "--no-register"]
    flags += ["--idle-timeout", "60", "--pin", "x"]
    arguments = create_model_worker_parser().parse_args(["--model-path", "x", *flags, "--embed-in-truncate"])
    config = worker_config(arguments, read_environment(), listeners, (ModelSpec(Path(arguments.model_path)),))
    for listener in listeners.sockets:
        listener.close()
    assert config.address == f"http://127.0.0.1:{listeners.port}"
    assert config.controller_address is None
    assert (config.stream_interval, config.default_seed, config.truncates_embedding_input) == (2, 3, True)
    assert (config.idle_timeout_s, config.pinned) == (60, ("x",))
    engine = config.engine
    assert (engine.max_running, engine.max_context, engine.max_batch_tokens) == (5, 64, 32)
    assert (engine.kv_cache_bytes, engine.max_device_bytes) == (2**20, 2 * 2**30)
