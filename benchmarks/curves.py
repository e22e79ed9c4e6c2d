"""Our engine over the whole range, not at a few points: streams, length of the prompt, context, aborts, two models.

    python benchmarks/curves.py            about half an hour
    python benchmarks/curves.py --fast     two minutes

The three forms of weights take turns, as in `compare.py`. Writes JSON; `report.py` makes the plots.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.compare import FIRST_TURN, OURS, RESULTS, WARM_UP, WEIGHTS, our_entry  # noqa: E402
from benchmarks.contestant import Contestant  # noqa: E402
from benchmarks.machine import measure_machine  # noqa: E402
from benchmarks.peers.environments import PEERS  # noqa: E402
from benchmarks.shared_model import write_shared_model  # noqa: E402

STREAMS = (1, 2, 4, 8, 16, 32, 64)
PROMPTS = (128, 256, 512, 1024, 2048, 4096, 8192)
CONTEXTS = (100, 8000)
STREAMS_SIZES = {"prompt_tokens": 128, "answer_tokens": 64}
CONTEXT_ANSWER = 33
"""The first token belongs to the prompt."""
SERVER_LIMIT_S = 120

Curve = list[dict[str, Any]]  # Any: JSON


def curve(flags: argparse.Namespace, model: Path, where: list[dict[str, int]], repeats: int) -> Curve:
    """Every form of weights at every point, in turns."""
    sizes = argparse.Namespace(
        threads=flags.threads,
        streams=[max(each["streams"] for each in where)],
        prompt_tokens=max(each["prompt_tokens"] for each in where),
        answer_tokens=max(each["answer_tokens"] for each in where),
    )
    logs = flags.json.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    turns: Curve = []
    with ExitStack() as running:
        contestants = []
        for weights in flags.weights:
            contestant = Contestant(our_entry(weights, model, sizes), logs, FIRST_TURN)
            running.callback(contestant.leave)
            contestant.turn(**{**WARM_UP, "streams": 1})
            contestants.append(contestant)
        for number in range(repeats):
            for each in where:
                for contestant in contestants:
                    seed = 1 + 1000 * number + each["streams"] + 7 * each["prompt_tokens"]
                    figures = contestant.turn(**each, seed=seed)
                    turns.append({"weights": contestant.entry.weights, "round": number, **figures})
                    print(
                        f"{contestant.entry.weights:9} {each['streams']:3} streams, prompt {each['prompt_tokens']:5}: "
                        f"decode {figures['decode_tokens_per_s']:7.1f}, prefill {figures['prefill_tokens_per_s']:7.1f}",
                        flush=True,
                    )
    return turns


def point(streams: int, prompt_tokens: int, answer_tokens: int) -> dict[str, int]:
    """One point of a curve."""
    return {"streams": streams, "prompt_tokens": prompt_tokens, "answer_tokens": answer_tokens}


def busy(flags: argparse.Namespace, model: Path, weights: str) -> dict[str, Any]:  # Any: JSON
    """Aborts and two models (`busy.py`), in a process of their own."""
    command = [sys.executable, ROOT / "benchmarks" / "busy.py", model, "--weights", weights]
    sizes = ["--repeats", "1", "--requests", "20", "--answer-tokens", "16"] if flags.fast else []
    variables = {**os.environ, "OMP_NUM_THREADS": str(flags.threads)}
    done = subprocess.run(
        [*command, "--threads", str(flags.threads), *sizes], check=True, stdout=subprocess.PIPE, env=variables
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{weights:9} two models: {figures['two_models_ratio']:.2f} of one, aborts: {figures['aborts_ratio']:.2f}")
    return figures


def first_token_of_server(model: Path) -> float:
    """Seconds from the command `fastchat serve` to the first token of a streamed answer."""
    port = free_port()
    command = [sys.executable, "-m", "fastchat", "serve", "--model-path", model, "--no-web", "--port", str(port)]
    others = ["--controller-port", "0", "--worker-port", "0"]
    body = {
        "model": model.name,
        "prompt": "Hello",
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    began = time.perf_counter()
    server = subprocess.Popen(
        [*command, *others], env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        while time.perf_counter() - began < SERVER_LIMIT_S and server.poll() is None:
            try:
                with urllib.request.urlopen(request) as answer:
                    if any(line.startswith(b"data: {") for line in answer):
                        return time.perf_counter() - began
            except (urllib.error.URLError, ConnectionError):  # it does not listen yet, or has no worker yet
                time.sleep(0.05)
        raise TimeoutError("fastchat serve gave no token")
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Measure one curve after the other and write all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the engines too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS[OURS], default=list(WEIGHTS[OURS]))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--layers", type=int, help="fewer layers, to try things out")
    parser.add_argument("--models", type=Path, default=PEERS / "models", help="where the model's files go")
    parser.add_argument("--json", type=Path, default=RESULTS / "curves.json", help="where the figures go")
    parser.add_argument("--rounds", type=int, default=2, help="over streams and contexts, default 2")
    parser.add_argument("--fast", action="store_true", help="fewer points, once")
    flags = parser.parse_args()
    streams, prompts, contexts = STREAMS, PROMPTS, CONTEXTS
    if flags.fast:
        streams, prompts, contexts, flags.rounds = (1, 8), (128, 1024), (100, 1000), 1
    model = flags.models / "qwen2-0.5b"
    write_shared_model(model, flags.layers)
    machine = asdict(measure_machine(flags.threads))
    figures = {
        "machine": machine,
        "server_first_token_s": first_token_of_server(model),
        "streams": curve(flags, model, [point(number, **STREAMS_SIZES) for number in streams], flags.rounds),
        "prompts": curve(flags, model, [point(1, number, 2) for number in prompts], 1),
        "contexts": curve(flags, model, [point(1, number, CONTEXT_ANSWER) for number in contexts], flags.rounds),
        "busy": [busy(flags, model, weights) for weights in flags.weights],
    }
    flags.json.parent.mkdir(parents=True, exist_ok=True)
    flags.json.write_text(json.dumps(figures, indent=1))
    print(f"figures: {flags.json}")


if __name__ == "__main__":
    main()
