"""People chatting with the page at once: the time between two updates that a browser gets, for one and for many.

    python benchmarks/web_users.py [--users 50] [--max-tokens 200] [--rounds 3]
    python benchmarks/web_users.py --page-url http://127.0.0.1:7860 --model NAME

Without a page it starts `fastchat serve` with a tiny model whose answers never end by themselves. Each user is what a
browser is to the page: posts one message and reads the events of its session. The page needs no account for this. The
first figure of each user, from the message to the first update, is told apart. CPU is that of the page's process, for
each update that it sent; it is known only of a page that was started here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from tests.checkpoints import write_checkpoint  # noqa: E402 - the tree it stands in is measured

MODEL = "endless"
READY = re.compile(r"^  page    (http://\S+)$", re.MULTILINE)
START_LIMIT_S = 180.0


@dataclass
class User:
    """What one user saw, in seconds."""

    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_updates: int = 0


def main() -> None:
    """Measure one user, then many, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page-url", help="a page that runs (default: one is started)")
    parser.add_argument("--model", default=MODEL, help="a model of that page")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.page_url:
        asyncio.run(measure(arguments, None))
        return
    with serving() as (arguments.page_url, page):
        asyncio.run(measure(arguments, page))


@contextmanager
def serving() -> Iterator[tuple[str, psutil.Process]]:
    """The URL and the process of the page of a `fastchat serve`, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        model = write_checkpoint(Path(folder, MODEL), "chatglm2", config={"seq_length": 8192, "eos_token_id": 10**6})
        ports = [word for name in ("", "controller-", "worker-", "web-") for word in (f"--{name}port", "0")]
        log = Path(folder, "log")
        environment = {**os.environ, "FASTCHAT_STATE_DIR": folder, "PYTHONPATH": str(ROOT / "src")}
        with log.open("w") as written:
            process = subprocess.Popen(
                [sys.executable, "-m", "fastchat.serve.main", "serve", *ports, "--model-path", str(model)],
                env={**environment, "OMP_NUM_THREADS": environment.get("OMP_NUM_THREADS", "1")},
                stdout=written,
                stderr=subprocess.STDOUT,
            )
        try:
            url = wait_for_page(process, log)
            children = psutil.Process(process.pid).children(recursive=True)
            yield url, next(child for child in children if "fastchat.serve.gradio_web_server" in child.cmdline())
        finally:
            process.terminate()
            process.wait(60)


def wait_for_page(process: subprocess.Popen[bytes], log: Path) -> str:
    """The page's URL, once all is ready."""
    deadline = time.monotonic() + START_LIMIT_S
    while (ready := READY.search(log.read_text())) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return ready[1]


async def measure(arguments: argparse.Namespace, page: psutil.Process | None) -> None:
    """One line for one user and one for many, in each round."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        async with session.get(f"{arguments.page_url}/config") as response:
            number = ask_event(await response.json())
        await wait_for_model(session, arguments)
        for num_users in (1, arguments.users) * arguments.rounds:
            began, cpu_began_s = time.monotonic(), cpu_s(page)
            users = await asyncio.gather(
                *(chat(session, arguments.page_url, number, arguments, index) for index in range(num_users))
            )
            report(num_users, users, time.monotonic() - began, cpu_s(page) - cpu_began_s if page else None)


async def wait_for_model(session: aiohttp.ClientSession, arguments: argparse.Namespace) -> None:
    """As a browser does: the page learns which models there are when somebody asks."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        async with session.get(f"{arguments.page_url}/page/models") as response:
            if arguments.model in (await response.json())["models"]:
                return
        await asyncio.sleep(0.5)
    raise SystemExit(f"{arguments.model} is not served; name another one with --model")


def cpu_s(page: psutil.Process | None) -> float:
    """What a process has computed so far, in seconds of one core."""
    return sum(page.cpu_times()[:2]) if page else 0.0


def ask_event(config: dict) -> int:
    """The number of the event that a sent message triggers."""
    box = next(each["id"] for each in config["components"] if each["props"].get("elem_id") == "message")
    return next(each["id"] for each in config["dependencies"] if [box, "submit"] in each["targets"])


async def chat(
    session: aiohttp.ClientSession, url: str, number: int, arguments: argparse.Namespace, index: int
) -> User:
    """One message and its answer."""
    user, session_hash = User(), secrets.token_hex(6)
    data = [f"Write a long story, number {index}.", [], arguments.model, "", 1.0, 1.0, str(arguments.max_tokens), "1"]
    event = {"data": data, "fn_index": number, "session_hash": session_hash, "trigger_id": None}
    began = last = time.monotonic()
    async with session.post(f"{url}/gradio_api/queue/join", json=event) as response:
        response.raise_for_status()
    async with session.get(f"{url}/gradio_api/queue/data", params={"session_hash": session_hash}) as response:
        async for line in response.content:
            if not line.startswith(b"data:"):
                continue
            message = json.loads(line[5:])
            if message["msg"] == "process_completed":
                assert message["success"], message
                break
            if message["msg"] != "process_generating":
                continue
            now = time.monotonic()
            user.num_updates += 1
            if user.num_updates == 2:  # the first is the question itself
                user.first_s = now - began
            elif user.num_updates > 2:
                user.gaps_s.append(now - last)
            last = now
    return user


def report(num_users: int, users: list[User], wall_s: float, page_cpu_s: float | None) -> None:
    """One line for a number of users."""
    gaps = sorted(gap for user in users for gap in user.gaps_s)
    p99 = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))]
    num_updates = sum(user.num_updates for user in users)
    cpu = (
        "" if page_cpu_s is None else f" page CPU={page_cpu_s:.1f}s, {page_cpu_s / num_updates * 1000:.1f}ms an update"
    )
    print(
        f"users={num_users} updates={num_updates} wall={wall_s:.1f}s "
        f"first p50={statistics.median(user.first_s for user in users) * 1000:.0f}ms "
        f"between updates p50={statistics.median(gaps) * 1000:.0f}ms p99={p99 * 1000:.0f}ms max={gaps[-1] * 1000:.0f}ms"
        f"{cpu}",
        flush=True,
    )


if __name__ == "__main__":
    main()
