"""A worker is killed in the middle of a stream, and another one that serves the model goes on with it."""

from __future__ import annotations

import json
import urllib.request

import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import start_command
from tests.system import MODEL_NAME, running_system

QUESTION = {
    "model": MODEL_NAME,
    "messages": [{"role": "user", "content": "Tell me a long story."}],
    "temperature": 0,
    "max_tokens": 1500,  # so long that it runs while the worker that computes it is looked for
    "ignore_eos": True,
    "n": 2,
}


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """A system whose model two processes serve."""
    folder = tmp_path_factory.mktemp("two")
    write_checkpoint(folder / MODEL_NAME, "chatglm2", config={"seq_length": 2048})
    model = ("--model-path", folder / MODEL_NAME, "--dtype", "float32")  # in which text does not depend on the batch
    with running_system(folder, worker_flags=model) as system:
        controller = f"http://127.0.0.1:{system.controller_flags[1]}"
        flags = ("--port", "0", "--controller-address", controller, *model)
        with start_command("model_worker", *flags, state_dir=system.state_dir) as second:
            second.wait_for_line("registered with the controller")
            yield system, [system.worker, second]


def num_running(worker, token) -> float:
    request = urllib.request.Request(f"{worker.url}/metrics", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("fastchat_num_requests_running"))


def test_a_stream_survives_the_death_of_its_worker(two_workers):
    """Every choice has the text that it has undisturbed, one role, one end, and the usage is exact."""
    system, workers = two_workers
    undisturbed = system.post("/v1/chat/completions", QUESTION)
    token = (system.state_dir / "cluster-token").read_text().strip()
    body = json.dumps({**QUESTION, "stream": True, "stream_options": {"include_usage": True}}).encode()
    request = urllib.request.Request(
        f"{system.api_url}/v1/chat/completions", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as stream:
        lines = [next(stream) for _ in range(12)]
        victim = workers[0] if num_running(workers[0], token) else workers[1]
        victim.kill()
        lines += list(stream)
    system.api.wait_for_line("stream resumed")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    assert lines[-2] == b"data: [DONE]\n"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert len({chunk["created"] for chunk in chunks}) == 1
    for choice in undisturbed["choices"]:
        deltas = [each for chunk in chunks for each in chunk["choices"] if each["index"] == choice["index"]]
        assert "".join(each["delta"].get("content", "") for each in deltas) == choice["message"]["content"]
        assert [each["delta"]["role"] for each in deltas if "role" in each["delta"]] == ["assistant"]
        assert [each["finish_reason"] for each in deltas if each["finish_reason"]] == [choice["finish_reason"]]
    usage, expected = chunks[-1]["usage"], undisturbed["usage"]
    assert [usage[name] for name in ("prompt_tokens", "completion_tokens")] == [
        expected[name] for name in ("prompt_tokens", "completion_tokens")
    ]
