"""What relaying costs: our API server and controller beside FastChat 0.2.36's, in one run, in turns.

    python -m benchmarks.relay [--json FILE] [--quick] [--fastchat-python .peers/fastchat/bin/python]

Both stand in front of a canned worker of their own protocol (`canned_upstream.py`), so that nothing but the relay is
measured; the clients (`stream_load.py`) share the machine's cores with it. FastChat needs an environment of its own:

    python3 -m venv .peers/fastchat
    .peers/fastchat/bin/pip install fschat==0.2.36 pydantic==1.10.27 fastapi==0.115.14 httpx aiohttp shortuuid tiktoken

(with newer ones it can not stream). Without it our own figures are measured alone. Times are medians of the rounds; a
ratio compares medians. CPU is that of API server and controller together, read from the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.stream_load import HEAD, Client, ask_many

ROOT = Path(__file__).resolve().parents[1]
START_LIMIT_S = 60.0
OURS, FASTCHAT = "ours", "FastChat 0.2.36"


@dataclass(frozen=True)
class System:
    """One API server with its controller and canned worker, running."""

    name: str
    url: str
    upstream_url: str
    api_pid: int
    controller_pid: int

    def cpu_s(self) -> float:
        """CPU seconds of API server and controller so far."""
        return sum(_cpu_s(pid) for pid in (self.api_pid, self.controller_pid))

    def memory_kib(self) -> int:
        """Resident memory of the API server."""
        status = Path(f"/proc/{self.api_pid}/status").read_text(encoding="ascii")
        return int(status.partition("VmRSS:")[2].split()[0])


@dataclass
class Figures:
    """What was measured of one system."""

    whole_per_s: list[float] = field(default_factory=list)
    whole_cpu_ms: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)
    added_first_token_ms: float = 0.0
    cpu_us_per_token: dict[int, float] = field(default_factory=dict)
    many: dict[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "whole_answers_per_s": statistics.median(self.whole_per_s),
            "cpu_ms_per_whole_answer": statistics.median(self.whole_cpu_ms),
            "streamed_tokens_per_s": statistics.median(self.tokens_per_s),
            "added_first_token_ms": self.added_first_token_ms,
            "cpu_us_per_streamed_token": self.cpu_us_per_token,
            "many_streams": self.many,
        }


def question(model: str, num_tokens: int, *, stream: bool) -> bytes:
    """A chat request."""
    messages = [{"role": "user", "content": "word " * 16}]
    return json.dumps({"model": model, "messages": messages, "max_tokens": num_tokens, "stream": stream}).encode()


async def measure_whole(system: System, figures: Figures, flags: argparse.Namespace) -> None:
    """Whole answers at 32 connections."""
    num_each = flags.whole // (1 if system.name == OURS else 10)
    cpu_s = system.cpu_s()
    answers, seconds = await ask_many(
        system.url, question("fast", 16, stream=False), num_clients=32, num_each=num_each, num_tokens=16
    )
    figures.whole_per_s.append(len(answers) / seconds)
    figures.whole_cpu_ms.append((system.cpu_s() - cpu_s) / len(answers) * 1e3)


async def measure_streams(system: System, figures: Figures, flags: argparse.Namespace) -> None:
    """Tokens per second of 32 streams that come as fast as they are taken."""
    num_each = max(1, flags.streams // (1 if system.name == OURS else 10))
    answers, seconds = await ask_many(
        system.url, question("fast", 128, stream=True), num_clients=32, num_each=num_each, num_tokens=128
    )
    figures.tokens_per_s.append(len(answers) * 128 / seconds)


async def measure_first_token(system: System, figures: Figures, flags: argparse.Namespace) -> None:
    """One stream after another, through the relay and directly to the worker, in turns."""
    if system.name == OURS:
        path, body = HEAD, question("fast", 4, stream=True)
    else:
        path = HEAD.replace(b"/v1/chat/completions", b"/worker_generate_stream")
        body = json.dumps({"model": "fast", "prompt": "x", "max_new_tokens": 4}).encode()
    relayed, direct = await Client.connect(system.url), await Client.connect(system.upstream_url)
    through: list[float] = []
    straight: list[float] = []
    for _ in range(flags.first_tokens):
        through.append((await relayed.ask(HEAD, question("fast", 4, stream=True))).first_token_s)
        straight.append((await direct.ask(path, body)).first_token_s)
    relayed.close()
    direct.close()
    figures.added_first_token_ms = (statistics.median(through) - statistics.median(straight)) * 1e3


async def measure_cpu(system: System, figures: Figures, flags: argparse.Namespace) -> None:
    """CPU for each token of short and of long answers that come at 200 events a second, 8 at once."""
    for num_tokens in (64, flags.long):
        num_each = max(1, flags.long // num_tokens)
        cpu_s = system.cpu_s()
        answers, _ = await ask_many(
            system.url,
            question("steady-200", num_tokens, stream=True),
            num_clients=8,
            num_each=num_each,
            num_tokens=num_tokens,
        )
        figures.cpu_us_per_token[num_tokens] = (system.cpu_s() - cpu_s) / (len(answers) * num_tokens) * 1e6


async def measure_many(system: System, figures: Figures, flags: argparse.Namespace) -> None:
    """Many streams of 20 events a second at once, beginning within two seconds."""
    num_tokens = flags.many_tokens
    before_kib = system.memory_kib()
    most_kib = before_kib
    cpu_s = system.cpu_s()
    asking = asyncio.ensure_future(
        ask_many(
            system.url,
            question("steady-20", num_tokens, stream=True),
            num_clients=flags.many,
            num_each=1,
            num_tokens=num_tokens,
            spread_s=2.0,
        )
    )
    while not asking.done():
        await asyncio.wait({asking}, timeout=0.25)
        most_kib = max(most_kib, system.memory_kib())
    answers, _ = await asking  # raises where one of them failed
    lates = [answer.times[-1] - answer.times[0] - num_tokens / 20 for answer in answers]
    firsts = sorted(answer.first_token_s for answer in answers)
    gaps = sorted(
        after - before for answer in answers for before, after in zip(answer.times, answer.times[1:], strict=False)
    )
    figures.many = {
        "streams": flags.many,
        "errors": 0,
        "memory_kib_per_stream": (most_kib - before_kib) / flags.many,
        "first_token_ms_p50": firsts[len(firsts) // 2] * 1e3,
        "first_token_ms_p99": firsts[int(len(firsts) * 0.99)] * 1e3,
        "gap_ms_p50": gaps[len(gaps) // 2] * 1e3,
        "gap_ms_p99": gaps[int(len(gaps) * 0.99)] * 1e3,
        "slowest_s_behind": max(lates),
        "cpu_us_per_token": (system.cpu_s() - cpu_s) / (flags.many * num_tokens) * 1e6,
    }


async def measure(systems: list[System], flags: argparse.Namespace) -> dict[str, Figures]:
    """All measurements, the systems in turns."""
    figures = {system.name: Figures() for system in systems}
    for system, stream in itertools.product(systems, (True, False)):  # what the first request makes is not measured
        await ask_many(system.url, question("fast", 16, stream=stream), num_clients=32, num_each=4, num_tokens=16)
    for step in (measure_whole, measure_streams):
        for _ in range(flags.rounds):
            for system in systems:
                await step(system, figures[system.name], flags)
    for step in (measure_first_token, measure_cpu):
        for system in systems:
            await step(system, figures[system.name], flags)
    await measure_many(systems[0], figures[systems[0].name], flags)
    return figures


@contextmanager
def our_system(folder: Path) -> Iterator[System]:
    """The API server and the controller of this tree."""
    token = secrets.token_hex(32)
    environment = {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
        "FASTCHAT_STATE_DIR": str(folder / "state"),
        "FASTCHAT_CLUSTER_TOKEN": token,
        "CLUSTER_TOKEN": token,
    }
    with _system(OURS, "ours", python=sys.executable, environment=environment, folder=folder) as system:
        yield system


@contextmanager
def fastchat_system(python: str, folder: Path, tokens_per_event: int) -> Iterator[System]:
    """The API server and the controller of FastChat 0.2.36, in its own environment."""
    flags = ("--tokens-per-event", str(tokens_per_event))
    environment = {"PYTHONPATH": ""}
    with _system(
        FASTCHAT, "fastchat-0.2", python=python, environment=environment, folder=folder, upstream_flags=flags
    ) as system:
        yield system


@contextmanager
def _system(
    name: str,
    protocol: str,
    *,
    python: str,
    environment: dict[str, str],
    folder: Path,
    upstream_flags: tuple[str, ...] = (),
) -> Iterator[System]:
    folder.mkdir()
    controller_port, api_port = _free_port(), _free_port()
    controller_url, url = f"http://127.0.0.1:{controller_port}", f"http://127.0.0.1:{api_port}"
    with ExitStack() as running:
        start = [python, "-m"]
        controller = running.enter_context(
            _process([*start, "fastchat.serve.controller", "--port", str(controller_port)], environment, folder)
        )
        api = running.enter_context(
            _process(
                [
                    *start,
                    "fastchat.serve.openai_api_server",
                    "--port",
                    str(api_port),
                    "--controller-address",
                    controller_url,
                ],
                environment,
                folder,
            )
        )
        _wait_until_connected(controller_port)
        upstream = running.enter_context(
            _process(
                [
                    sys.executable,
                    str(Path(__file__).with_name("canned_upstream.py")),
                    protocol,
                    controller_url,
                    *upstream_flags,
                ],
                environment | {"PYTHONPATH": str(ROOT / "src")},
                folder,
            )
        )
        assert upstream.stdout is not None
        upstream_url = upstream.stdout.readline().strip()
        _wait_for_models(url)
        yield System(name, url, upstream_url, api.pid, controller.pid)


@contextmanager
def _process(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block; stdout is read where somebody waits for it, logs go to a file."""
    log = (folder / f"{len(list(folder.iterdir()))}.log").open("w", encoding="utf-8")
    is_upstream = "canned_upstream" in command[1]
    process = subprocess.Popen(
        command,
        env={**os.environ, **environment},
        cwd=folder,
        stdout=subprocess.PIPE if is_upstream else log,
        stderr=log,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()
        if process.stdout is not None:
            process.stdout.close()


def _wait_until_connected(port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")


def _wait_for_models(url: str) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
                if json.load(answer)["data"]:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise TimeoutError(f"{url} lists no models")


def _free_port() -> int:
    """It stays bound here without being listened on, so that only who names it may have it."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    holder.detach()  # open until this process ends
    return port


def _cpu_s(pid: int) -> float:
    """CPU time of all threads of a process that live."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text(encoding="ascii").split()[0]) for thread in threads) / 1e9


def report(figures: dict[str, Figures], flags: argparse.Namespace) -> dict[str, Any]:
    """Print the table; returns the same as JSON."""
    summaries = {name: each.summary() for name, each in figures.items()}
    ours, theirs = summaries[OURS], summaries.get(FASTCHAT)

    def row(what: str, ours_value: float, their_value: float | None, *, wants_ratio: bool = False) -> None:
        shown = "-" if their_value is None else f"{their_value:.2f}"
        ratio = f"{ours_value / their_value:.1f} x" if wants_ratio and their_value else ""
        print(f"{what:58} {ours_value:12.2f} {shown:>16} {ratio:>8}", flush=True)

    def of_theirs(name: str) -> float | None:
        return theirs[name] if theirs else None

    print(f"{'':58} {OURS:>12} {FASTCHAT:>16} {'ratio':>8}")
    for name, what in (
        ("whole_answers_per_s", "whole answers/s, 32 connections"),
        ("streamed_tokens_per_s", "streamed tokens/s, 32 streams of 128 tokens"),
    ):
        row(what, ours[name], of_theirs(name), wants_ratio=True)
    row("CPU ms for a whole answer", ours["cpu_ms_per_whole_answer"], of_theirs("cpu_ms_per_whole_answer"))
    row("added time to the first token, 1 stream, ms", ours["added_first_token_ms"], of_theirs("added_first_token_ms"))
    for num_tokens, value in ours["cpu_us_per_streamed_token"].items():
        their_value = theirs["cpu_us_per_streamed_token"][num_tokens] if theirs else None
        row(f"CPU us for a streamed token, answers of {num_tokens} tokens", value, their_value)
    for name, value in ours["many_streams"].items():
        row(f"{flags.many} streams of 20 events/s: {name}", value, None)
    return summaries


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work, for a first look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--many", type=int, default=1000, help="paced streams at once (default: 1000)")
    parser.add_argument("--tokens-per-event", type=int, default=2, help="of FastChat's worker (default: 2, its own)")
    parser.add_argument(
        "--fastchat-python",
        default=os.environ.get("FASTCHAT_PEER_PYTHON", str(ROOT / ".peers/fastchat/bin/python")),
        help="of the environment with fschat 0.2.36 (default: $FASTCHAT_PEER_PYTHON or .peers/fastchat/bin/python)",
    )
    flags = parser.parse_args()
    flags.whole, flags.streams, flags.first_tokens, flags.long, flags.many_tokens = (
        (60, 10, 50, 512, 60) if flags.quick else (400, 60, 200, 4096, 200)
    )
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        systems = [running.enter_context(our_system(Path(folder) / "ours"))]
        if Path(flags.fastchat_python).exists():
            peer = fastchat_system(flags.fastchat_python, Path(folder) / "fastchat", flags.tokens_per_event)
            systems.append(running.enter_context(peer))
        else:
            print(f"FastChat 0.2.36 is not at {flags.fastchat_python}; see --help. Ours alone:")
        summaries = report(uvloop.run(measure(systems, flags)), flags)
    if flags.json is not None:
        flags.json.write_text(json.dumps(summaries, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
