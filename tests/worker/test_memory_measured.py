"""The plan beside what real processes hold: anonymous memory at its peak, with the KV cache full."""

import json
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from fastchat.models.checkpoint import Checkpoint
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import DeviceMemory
from fastchat.worker.host_memory import anonymous_bytes
from fastchat.worker.memory_plan import plan_memory
from fastchat.worker.model_needs import PlannedModel
from tests.checkpoints import write_hollow_checkpoint
from tests.processes import run_command, start_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TOKEN = "a-token-of-the-tests-with-32-letters"
CONTEXT = 384
NUM_SEQUENCES = 2
NATIVE = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 60000,
}
CHATGLM = {
    "hidden_size": 1024,
    "ffn_hidden_size": 2048,
    "num_layers": 4,
    "num_attention_heads": 8,
    "kv_channels": 128,
    "padded_vocab_size": 60000,
}
FLAGS = ("--device", "cpu", "--limit-worker-concurrency", NUM_SEQUENCES, "--max-context", CONTEXT)


@contextmanager
def peak_of(pid):
    """The largest that the process's anonymous memory is while the block lasts, as a list of one."""
    peak, is_done = [0], threading.Event()

    def watch():
        while not is_done.wait(0.01):
            peak[0] = max(peak[0], anonymous_bytes(str(pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        is_done.set()
        watcher.join()


def complete(url, name, first_id):
    """A prompt and an answer that fill one sequence's part of the cache, with the logits of all its tokens."""
    body = {
        "model": name,
        "prompt": [first_id, *[7] * (CONTEXT - 6)],
        "max_tokens": 4,
        "ignore_eos": True,
        "echo": True,
        "logprobs": 5,
    }
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        assert json.load(answer)["choices"][0]["finish_reason"] == "length"


def measured(tmp_path, module, folders, *flags):
    models = [part for folder in folders for part in ("--model-path", folder)]
    arguments = [*models, "--port", "0", "--no-register", *FLAGS, *flags]
    environment = {"FASTCHAT_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with (
        start_command(module, *map(str, arguments), state_dir=tmp_path, environment=environment) as worker,
        peak_of(worker.pid) as peak,
    ):
        url = worker.url
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(complete, url, folder.name, 20 + number)
                for folder in folders
                for number in range(NUM_SEQUENCES)
            ]
            for each in asked:
                each.result()
    return peak[0]


def planned(folders, **options):
    engine = EngineSpec(device="cpu", max_running=NUM_SEQUENCES, max_context=CONTEXT, **options)
    models = [PlannedModel.of(Checkpoint.open(folder), folder.name) for folder in folders]
    return plan_memory(models, engine, DeviceMemory("cpu", 2**40)).total_bytes


def assert_near(plan_bytes, measured_bytes):
    """Within 10 % and 200 MB."""
    assert abs(plan_bytes - measured_bytes) <= 0.1 * measured_bytes + 200e6, (plan_bytes, measured_bytes)


@pytest.mark.parametrize(
    ("family", "config", "dtype"),
    [("chatglm2", CHATGLM, "float32"), ("llama", NATIVE, "bfloat16"), ("qwen2", NATIVE, "float32")],
)
def test_plan_is_what_a_worker_holds(tmp_path, family, config, dtype):
    """Weights, a full KV cache, the steps' peak, libraries and all."""
    folder = write_hollow_checkpoint(tmp_path / family, family, dtype=torch.bfloat16, config=config)
    held = measured(tmp_path, "model_worker", [folder], "--dtype", dtype)
    assert held > 500e6
    assert_near(planned([folder], dtype=dtype), held)


def test_plan_is_what_several_models_of_a_worker_hold(tmp_path):
    """Together, within the budget that the worker was given."""
    folders = [
        write_hollow_checkpoint(tmp_path / name, name, dtype=torch.bfloat16, config=config)
        for name, config in (("chatglm3", CHATGLM), ("qwen3", NATIVE))
    ]
    held = measured(tmp_path, "multi_model_worker", folders, "--dtype", "bfloat16", "--memory", "1300MB")
    assert held <= 1300e6
    assert_near(planned(folders, dtype="bfloat16"), held)


def test_worker_without_room_refuses_before_it_reads_a_weight_and_names_what_fits(tmp_path):
    """One line, a configuration error's exit code; and what it names is true."""
    folder = write_hollow_checkpoint(tmp_path / "llama", "llama", dtype=torch.bfloat16, config=NATIVE)
    flags = ["--model-path", folder, "--port", "0", "--no-register", *FLAGS, "--memory", "850MB"]
    refused = run_command("model_worker", *flags, "--dtype", "float32", state_dir=tmp_path)
    assert refused.returncode == 2
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: llama needs at least 1.")
    assert "the budget is 0.85 GB (0.79 GiB) (--memory); the same command with --dtype bfloat16 fits (0." in line
    assert "Loading" not in refused.stderr
    held = measured(tmp_path, "model_worker", [folder], "--dtype", "bfloat16", "--memory", "850MB")
    assert held <= 850e6
