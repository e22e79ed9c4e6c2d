"""Many small models in one worker with memory for some: a random workload, its waits, and its memory.

    python benchmarks/many_models.py --models 10 --at-once 4 --requests 1000

Makes checkpoints with random weights in a temporary folder, starts a worker whose budget the plan finds enough for
`--at-once` of them, and streams short greedy answers of models drawn at random. Every answer is compared with what its
model said when it was asked alone. Linux only: memory is what /proc says is anonymous.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import orjson

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from fastchat.models.checkpoint import Checkpoint  # noqa: E402 - the tree it stands in is measured
from fastchat.worker.config import EngineSpec  # noqa: E402
from fastchat.worker.device_memory import DeviceMemory  # noqa: E402
from fastchat.worker.memory_plan import plan_turns  # noqa: E402
from fastchat.worker.model_needs import PlannedModel  # noqa: E402
from tests.checkpoints import write_checkpoint  # noqa: E402

TOKEN = "a-token-for-this-benchmark-alone"
CONTEXT, RUNNING, NUM_PROMPTS = 256, 4, 5
ENGINE = EngineSpec(device="cpu", dtype="float32", max_context=CONTEXT, max_running=RUNNING)
CONTROL_PATH = "/api/v1/models"


@dataclass(frozen=True)
class Asked:
    """One answer. `wait_s` is the time to its first token."""

    wait_s: float
    token_ids: tuple[int, ...]


def write_models(root: Path, flags: argparse.Namespace) -> list[Path]:
    """Llamas of one shape, each with weights of its own."""
    shape = {"hidden_size": flags.hidden, "intermediate_size": 2 * flags.hidden, "vocab_size": 8000}
    return [
        write_checkpoint(root / f"model-{number}", "llama", seed=number, config={**shape, "num_hidden_layers": 4})
        for number in range(flags.models)
    ]


def find_budget(folders: list[Path], at_once: int) -> int:
    """The smallest budget, to a mebibyte, with which so many of the models are in memory at once."""
    models = [PlannedModel.of(Checkpoint.open(folder), folder.name) for folder in folders]
    low, high = 1, 2**16  # MiB
    while low < high:
        middle = (low + high) // 2
        engine = replace(ENGINE, max_memory_bytes=middle * 2**20)
        plan = plan_turns(models, engine, DeviceMemory("cpu", 2**40))
        low, high = (low, middle) if plan is not None and plan.num_awake >= at_once else (middle + 1, high)
    return low * 2**20


@contextmanager
def running_worker(folders: list[Path], budget: int, root: Path) -> Iterator[tuple[int, Path, str]]:
    """The worker's process id, its log, and its URL once it listens."""
    port = random.randrange(30000, 50000)
    models = [word for folder in folders for word in ("--model-path", str(folder))]
    flags = ["--port", str(port), "--no-register", "--memory", str(budget), "--device", "cpu", "--dtype", "float32"]
    flags += ["--max-context", str(CONTEXT), "--limit-worker-concurrency", str(RUNNING)]
    log = root / "log"
    environment = {**os.environ, "FASTCHAT_CLUSTER_TOKEN": TOKEN, "FASTCHAT_STATE_DIR": str(root / "state")}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")}
    with log.open("w") as written:
        process = subprocess.Popen(
            [sys.executable, "-m", "fastchat.serve.multi_model_worker", *models, *flags],
            env=environment,
            stdout=written,
            stderr=subprocess.STDOUT,
        )
    try:
        while "Uvicorn running" not in log.read_text():
            if process.poll() is not None:
                raise SystemExit(log.read_text())
            time.sleep(0.1)
        yield process.pid, log, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def ask(session: aiohttp.ClientSession, model: str, number: int) -> Asked:
    """One streamed answer; raises where it is not whole."""
    body = {"model": model, "prompt": [10 + number % NUM_PROMPTS, 11, 12, 13], "max_tokens": 8, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "return_token_ids": True}
    began, wait_s, token_ids = time.perf_counter(), 0.0, []
    async with session.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                new = orjson.loads(line[6:])["choices"][0].get("token_ids", ())
                wait_s = wait_s or (time.perf_counter() - began if new else 0.0)
                token_ids += new
    assert len(token_ids) == 8, f"{model} sent {len(token_ids)} tokens"
    return Asked(wait_s, tuple(token_ids))


def anonymous_bytes(pid: int) -> int:
    """The memory that a process has of its own, beside files."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def count_asleep(log: Path) -> int:
    """How many times a model has left."""
    return log.read_text().count("model asleep")


@asynccontextmanager
async def watched_memory(session: aiohttp.ClientSession, pid: int) -> AsyncIterator[list[int]]:
    """The peaks of anonymous memory and of what the worker reckons, as a list of two."""
    peaks = [0, 0]

    async def watch() -> None:
        while True:
            peaks[0] = max(peaks[0], anonymous_bytes(pid))
            async with session.get(CONTROL_PATH) as answer:
                peaks[1] = max(peaks[1], (await answer.json())["workers"][0]["used_bytes"])
            await asyncio.sleep(0.02)

    task = asyncio.get_running_loop().create_task(watch())
    try:
        yield peaks
    finally:
        task.cancel()


async def measure(flags: argparse.Namespace, pid: int, url: str, log: Path, budget: int) -> None:
    """Ask each model alone, then all at random, and say what came of it."""
    names = [f"model-{number}" for number in range(flags.models)]
    chance = random.Random(flags.seed)
    gate = asyncio.Semaphore(flags.clients)
    headers, timeout = {"authorization": f"Bearer {TOKEN}"}, aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        alone = {(name, n): (await ask(session, name, n)).token_ids for name in names for n in range(NUM_PROMPTS)}

        async def one(number: int, name: str) -> Asked:
            async with gate:
                return await ask(session, name, number)

        num_asleep = count_asleep(log)
        drawn = [chance.choice(names) for _ in range(flags.requests)]
        began = time.perf_counter()
        async with watched_memory(session, pid) as peaks:
            outcomes = await asyncio.gather(*map(one, range(flags.requests), drawn), return_exceptions=True)
        seconds = time.perf_counter() - began
        async with session.get(CONTROL_PATH) as answer:
            worker = (await answer.json())["workers"][0]
    answers = [(at, outcome) for at, outcome in enumerate(outcomes) if isinstance(outcome, Asked)]
    num_right = sum(each.token_ids == alone[drawn[at], at % NUM_PROMPTS] for at, each in answers)
    waits = sorted(each.wait_s for _, each in answers)
    percentiles = statistics.quantiles(waits, n=100)
    num_evictions = count_asleep(log) - num_asleep
    print(f"{flags.models} models, memory for {flags.at_once}, {flags.requests} requests of {flags.clients} clients")
    print(f"answered {len(answers)}, as when asked alone {num_right}, in {seconds:.0f} s")
    print(f"evictions {num_evictions}, wait p50 {percentiles[49]:.2f} s, p99 {percentiles[98]:.2f} s")
    print(f"anonymous memory at its peak {peaks[0] / 2**20:.0f} MiB of a budget of {budget / 2**20:.0f} MiB")
    print(f"models at their peak {peaks[1] / 2**20:.0f} MiB of {worker['budget_bytes'] / 2**20:.0f} MiB for models")


def main() -> None:
    """Make, run, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("models", 10), ("at-once", 4), ("requests", 1000), ("clients", 16), ("hidden", 256)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folders = write_models(Path(folder), flags)
        budget = find_budget(folders, flags.at_once)
        with running_worker(folders, budget, Path(folder)) as (pid, log, url):
            asyncio.run(measure(flags, pid, url, log, budget))


if __name__ == "__main__":
    main()
