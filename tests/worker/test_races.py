"""Models that come and go in a real worker process, moved by requests and operators at once."""

import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastchat.models.checkpoint import Checkpoint
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import DeviceMemory
from fastchat.worker.memory_plan import plan_memory
from fastchat.worker.model_needs import PlannedModel
from tests.checkpoints import write_checkpoint
from tests.processes import start_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TOKEN = "a-token-of-the-tests-with-32-letters"
NAMES = ("first", "second", "third")
SIZES = {"hidden_size": 512, "intermediate_size": 512, "vocab_size": 16000, "num_hidden_layers": 2}
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-context", "256", "--limit-worker-concurrency", "4")
ENGINE = EngineSpec(device="cpu", dtype="float32", max_context=256, max_running=4)
PATH = "/api/v1/models"
ONE_MODEL = 64 * 2**20


class Worker:
    """The process as its clients see it."""

    def __init__(self, process, folders):
        self.process, self.folders = process, folders
        self.client = httpx2.Client(base_url=process.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=120)

    def answer(self, name, number):
        """Status, and the greedy ids of one short completion."""
        answer = self.client.post("/v1/completions", json=body(name, number))
        return answer.status_code, answer.json()["choices"][0]["token_ids"] if answer.status_code == 200 else answer

    def leave(self, name, number):
        """Begin a stream and go before its end."""
        with self.client.stream("POST", "/v1/completions", json=body(name, number, stream=True)) as answer:
            next(answer.iter_bytes())

    def act(self, name, action):
        return self.client.post(f"{PATH}/{name}/{action}")

    def state(self):
        """Rows by name, and the worker's own."""
        document = self.client.get(PATH).json()
        return {row["id"]: row for row in document["data"]}, document["workers"][0]

    def anonymous_bytes(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def body(name, number, **options):
    prompt = [10 + number % 5, 11, 12, 13]
    extra = {"ignore_eos": True, "return_token_ids": True, "temperature": 0, "max_tokens": 6}
    return {"model": name, "prompt": prompt, **extra, **options}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """Three models in a process with room for two."""
    root = tmp_path_factory.mktemp("races")
    folders = {
        name: write_checkpoint(root / name, "llama", seed=seed, config=SIZES, num_shards=3)
        for seed, name in enumerate(NAMES)
    }
    planned = [PlannedModel.of(Checkpoint.open(folder), name) for name, folder in folders.items()]
    needed = [plan_memory(planned[:number], ENGINE, DeviceMemory("cpu", 2**40)).least_bytes for number in (2, 3)]
    flags = [word for folder in folders.values() for word in ("--model-path", str(folder))]
    flags += ["--port", "0", "--no-register", "--memory", str((needed[0] + 2 * needed[1]) // 3), *FLAGS]
    environment = {"FASTCHAT_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with start_command("multi_model_worker", *flags, state_dir=root, environment=environment) as process:
        process.wait_for_line("worker ready")
        worker = Worker(process, folders)
        with worker.client:
            yield worker


@pytest.fixture(scope="module")
def expected(worker):
    """What every model says to every prompt, asked one after the other."""
    answers = {(name, number): worker.answer(name, number) for name in NAMES for number in range(5)}
    assert all(status == 200 for status, _ in answers.values())
    return {key: token_ids for key, (_, token_ids) in answers.items()}


@pytest.mark.parametrize("seed", range(2))
def test_any_history_of_requests_and_operators_is_answered_rightly(worker, expected, seed):
    """Requests, clients that leave and operators, six at a time: right ids or a true refusal, within the budget."""
    chance = random.Random(seed)
    does = [chance.choice(["ask"] * 6 + ["leave", "load", "unload", "sleep", "pin", "unpin"]) for _ in range(36)]

    def one(number):
        name, what = NAMES[(number * 7 + seed) % 3], does[number]
        if what == "ask":
            status, outcome = worker.answer(name, number)
            if status == 200:
                assert outcome == expected[name, number % 5]
            else:  # the two others were pinned by others
                assert (status, outcome.json()["error"]["code"]) == (503, "model_does_not_fit")
        elif what == "leave":
            worker.leave(name, number)
        else:
            outcome = worker.act(name, what)
            codes = {200: None, 409: "model_pinned", 503: "model_does_not_fit"}
            assert outcome.json().get("error", {}).get("code") == codes[outcome.status_code]
        _, memory = worker.state()
        assert memory["used_bytes"] <= memory["budget_bytes"]

    with ThreadPoolExecutor(6) as pool:
        unpinning = pool.submit(keep_unpinning, worker, done := [])
        try:
            list(pool.map(one, range(len(does)), timeout=120))
        finally:
            done.append("now")
        unpinning.result()
    for name in NAMES:
        assert worker.act(name, "unpin").status_code == 200
        assert worker.answer(name, 0) == (200, expected[name, 0])
    rows, _ = worker.state()
    assert all(row["num_running"] == row["num_waiting"] == 0 for row in rows.values())


def keep_unpinning(worker, done):
    """An operator who lets go again, so that nobody waits for ever."""
    while not done:
        for name in NAMES:
            worker.act(name, "unpin")
        time.sleep(0.2)


def test_a_load_that_fails_half_way_gives_its_memory_back_and_tells_everybody(worker, expected):
    """Once its files are whole again the model answers; the others answered meanwhile."""
    worker.act("third", "unload")
    before, used_before = worker.anonymous_bytes(), worker.state()[1]["used_bytes"]
    last = sorted(worker.folders["third"].glob("*.safetensors"))[-1]
    whole = last.read_bytes()
    spoil(last)
    with ThreadPoolExecutor(4) as pool:
        outcomes = [pool.submit(worker.answer, "third", number) for number in range(3)]
        other = pool.submit(worker.answer, "first", 1)
        for status, answer in (outcome.result() for outcome in outcomes):
            assert (status, answer.json()["error"]["type"]) == (500, "server_error")
        assert other.result() == (200, expected["first", 1])
    assert [worker.answer("third", number)[0] for number in range(3)] == [500] * 3  # each reads the others once more
    worker.process.wait_for_line("model could not be loaded .*" + last.name)
    rows, memory = worker.state()
    assert rows["third"]["state"] == "asleep"
    assert memory["used_bytes"] <= used_before + rows["first"]["memory_bytes"]
    loaded = rows["first"]["memory_bytes"] if memory["used_bytes"] > used_before else 0
    assert worker.anonymous_bytes() <= before + loaded + ONE_MODEL
    last.write_bytes(whole)
    assert worker.answer("third", 2) == (200, expected["third", 2])


def spoil(file):
    """One tensor of the last file has a wrong shape: found when the others have been read."""
    tensors = load_file(file)
    name = sorted(tensors)[-1]
    replacement = file.with_suffix(".new")
    save_file({**tensors, name: torch.zeros(3)}, replacement, metadata={"format": "pt"})
    replacement.rename(file)
