"""A worker that serves a base and its adapters, each under its own name, by one engine."""

import pytest

from fastchat.worker.config import ModelSpec
from tests.adapters import modules_of, write_lora, write_merged
from tests.checkpoints import write_checkpoint
from tests.worker.conftest import serving, worker_config

PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    base = write_checkpoint(root / "chatglm2-6b", "chatglm2")
    changes = write_lora(root / "lora", base, modules_of("chatglm2"))
    return {"chatglm2-6b": base, "lora": root / "lora", "merged": write_merged(root / "merged", base, changes)}


@pytest.fixture(scope="module", params=["thread", "process"])
def worker(request, thread, checkpoints, folders):
    models = tuple(ModelSpec(folders[name]) for name in ("chatglm2-6b", "lora"))
    config = worker_config(checkpoints, models=models)
    config = type(config)(
        models=models,
        address=config.address,
        cluster_token=config.cluster_token,
        engine=type(config.engine)(
            device="cpu", dtype="float32", engine_place=request.param, kv_cache_bytes=2**22, max_running=8
        ),
    )
    with serving(thread, config) as worker:
        yield worker


def completed(worker, model):
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answer = worker.post("/v1/completions", {**body, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["token_ids"]


def test_each_name_answers_as_its_own_model(worker, thread, checkpoints, folders):
    """Over HTTP, from an engine on a thread and from one in a process; embeddings too."""
    assert [card["id"] for card in worker.get("/v1/models").json()["data"]] == ["chatglm2-6b", "lora"]
    with serving(thread, worker_config(checkpoints, models=(ModelSpec(folders["merged"]),))) as merged:
        assert completed(worker, "lora") == completed(merged, "merged") != completed(worker, "chatglm2-6b")
        vectors = [
            server.post("/v1/embeddings", {"model": name, "input": "你好"}).json()["data"][0]["embedding"]
            for server, name in ((worker, "lora"), (merged, "merged"), (worker, "chatglm2-6b"))
        ]
    assert vectors[0] == pytest.approx(vectors[1], abs=1e-5)
    assert vectors[0] != pytest.approx(vectors[2], abs=1e-2)


def test_one_engine_is_watched_and_counted_once(worker):
    """The load and the metrics of an engine do not double with its adapters; requests are counted by name."""
    completed(worker, "lora")
    text = worker.get("/metrics").text
    for line in text.splitlines():
        assert "steps" not in line or "lora" not in line
    assert 'model_name="lora"' in text
    assert 'num_requests_running{model_name="lora"' not in text.replace("fastchat_", "").replace("vllm:", "")
    chat = worker.chat(model="lora", max_tokens=4)
    assert chat["model"] == "lora"


def test_two_checkpoints_with_equal_weights_are_held_once(thread, checkpoints, folders):
    """The metric says what two models of one worker save; the answers are each one's own."""
    models = (ModelSpec(folders["chatglm2-6b"], ("a",)), ModelSpec(folders["chatglm2-6b"], ("b",)))
    with serving(thread, worker_config(checkpoints, models=models)) as worker:
        (line,) = [line for line in worker.get("/metrics").text.splitlines() if line.startswith("fastchat_shared_w")]
        assert float(line.split()[-1]) > 200_000
        assert completed(worker, "a") == completed(worker, "b")
