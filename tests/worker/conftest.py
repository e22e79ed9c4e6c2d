"""A real worker with two small models, served on a free port, and clients that talk to it from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import contextmanager

import httpx2
import orjson
import pytest
import torch

from fastchat.worker.app import create_worker_app
from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig
from tests.checkpoints import write_checkpoint
from tests.gateway.loop_thread import LoopThread

TOKEN = "cluster-token-of-these-tests"
ENGINE = EngineSpec(device="cpu", dtype="float32", engine_place="thread", kv_cache_bytes=32 * 2**20)
PATIENCE_S = 60.0


class Worker:
    """A served worker; `runtime` is its inside, which laws about blocks look at."""

    def __init__(self, url, runtime):
        self.url = url
        self.runtime = runtime
        self.client = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60)

    def get(self, path, **options):
        return self.client.get(path, **options)

    def post(self, path, body, **headers):
        return self.client.post(path, content=orjson.dumps(body), headers=headers)

    def chat(self, **body):
        answer = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "你好"}], **body})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def stats(self, name):
        return self.runtime.models.find(name).engine.stats

    def wait_until_empty(self):
        """Nothing runs, nothing waits, every block is free."""
        wait_until(lambda: all(is_empty(model.engine.stats) for _, model in self.runtime.models))


def is_empty(stats):
    return stats.num_running == stats.num_waiting == 0 and stats.num_free_blocks == stats.num_blocks


def wait_until(condition: Callable[[], bool]) -> None:
    """Until the condition holds; fails when it does not come."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


@contextmanager
def slowed_down(worker):
    """As beside a model that always computes: every step waits 20 ms for its turn, so that a long answer is still
    running when a test acts on it, however late that is.
    """
    turns = worker.runtime.models.find("qwen").engine._engine()._turns
    is_over = threading.Event()

    def take_turns():
        while not is_over.is_set():
            with turns.turn():
                time.sleep(0.02)

    other = threading.Thread(target=take_turns)
    other.start()
    try:
        yield
    finally:
        is_over.set()
        other.join()


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny models gain nothing from two, and the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folders of two small models."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "chatglm2-6b": write_checkpoint(folder / "chatglm2-6b", "chatglm2"),
        "qwen": write_checkpoint(folder / "qwen", "qwen2", generation_config={"temperature": 0.0, "eos_token_id": 2}),
    }


@pytest.fixture(scope="session")
def thread():
    thread = LoopThread()
    yield thread
    thread.close()


@contextmanager
def serving(thread, config, *, port=0, **options):
    app = create_worker_app(config, **options)
    with thread.serve(app, port) as url:
        worker = Worker(url, app.state.runtime)
        with worker.client:
            yield worker


def worker_config(checkpoints, **options):
    specs = (
        ModelSpec(checkpoints["chatglm2-6b"], ("chatglm2-6b", "vicuna-7b-v1.3")),
        ModelSpec(checkpoints["qwen"]),
    )
    return WorkerConfig(
        **{"models": specs, "address": "http://127.0.0.1:1", "cluster_token": TOKEN, "engine": ENGINE, **options}
    )


@pytest.fixture(scope="session")
def worker(thread, checkpoints):
    with serving(thread, worker_config(checkpoints)) as worker:
        yield worker
