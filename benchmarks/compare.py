"""Our engine beside others that are installed, on the same weights, in turns.

    python benchmarks/compare.py                     as many rounds as fit into 22 minutes, at least two
    python benchmarks/compare.py --fast              a few minutes: one round, short answers
    python benchmarks/compare.py --only fastchat llama-cpp
    python benchmarks/peers/environments.py          first, once: installs the others

Every engine is a process of its own that is stopped while another one works (`contestant.py`), so all figures of a
round are of the same minutes. Each turn has new random prompts, the same for all; greedy, the end of text ignored.
Writes JSON; `report.py` makes the tables and plots.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

from benchmarks.contestant import Contestant, Entry  # noqa: E402 - the lines above make `benchmarks` known
from benchmarks.machine import measure_machine  # noqa: E402
from benchmarks.peers.environments import ENVIRONMENTS, PEERS, Environment  # noqa: E402
from benchmarks.shared_model import write_shared_model  # noqa: E402

SCRIPTS = Path(__file__).parent / "peers"
RESULTS = ROOT / ".benchmarks"
OURS = "fastchat"
WEIGHTS = {OURS: ("bfloat16", "int8", "int4"), "llama-cpp": ("bfloat16", "int8", "int4")}
"""The forms that an engine runs; the others run bfloat16 alone."""
ENGINES = (OURS, *ENVIRONMENTS)
LONG_TURN_S = 60
"""A turn that took longer is not repeated in later rounds."""
FIRST_TURN = {"streams": 1, "prompt_tokens": 16, "answer_tokens": 1, "seed": 1}
WARM_UP = {"streams": 4, "prompt_tokens": 64, "answer_tokens": 8, "seed": 2}


@dataclass
class Comparison:
    """All that was measured, as it is written."""

    settings: dict[str, Any]  # Any: the flags
    machine_before: dict[str, Any]
    machine_after: dict[str, Any] = field(default_factory=dict)
    contestants: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def write(self, file: Path) -> None:
        """After every round, so that an ended run has what was measured."""
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1))


def our_entry(weights: str, model: Path, flags: argparse.Namespace) -> Entry:
    """Our engine with the interpreter that runs this."""
    variables = {
        "OMP_NUM_THREADS": str(flags.threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    return Entry(OURS, weights, _command(Path(sys.executable), "run_fastchat.py", weights, model, flags), variables)


def peer_entry(environment: Environment, weights: str, model: Path, flags: argparse.Namespace) -> Entry:
    """Another engine in its own virtual environment."""
    command = _command(environment.python, environment.script, weights, model, flags)
    return Entry(environment.name, weights, command, {**environment.variables(flags.threads), "PYTHONPATH": ""})


def _command(python: Path, script: str, weights: str, model: Path, flags: argparse.Namespace) -> list[str]:
    command = [str(python), str(SCRIPTS / script), "--model", str(model), "--weights", weights]
    context = flags.prompt_tokens + flags.answer_tokens
    sizes = {"threads": flags.threads, "streams": max(flags.streams), "context": -(-context // 128) * 128}
    return command + [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def entries(flags: argparse.Namespace, not_run: dict[str, str]) -> Iterator[Entry]:
    """Everything that can run here; what cannot is written into `not_run`."""
    model = flags.models / "qwen2-0.5b"
    write_shared_model(model, flags.layers)
    for engine in flags.only:
        for weights in WEIGHTS.get(engine, ("bfloat16",)):
            if engine == OURS:
                yield our_entry(weights, model, flags)
                continue
            environment = ENVIRONMENTS[engine]
            if not environment.is_installed:
                not_run[f"{engine} {weights}"] = "not installed"
                continue
            file = _gguf_files(environment, model, flags) / f"{weights}.gguf" if engine == "llama-cpp" else model
            yield peer_entry(environment, weights, file, flags)


def _gguf_files(environment: Environment, model: Path, flags: argparse.Namespace) -> Path:
    folder = flags.models / "qwen2-0.5b-gguf"
    subprocess.run(
        [environment.python, SCRIPTS / "write_gguf.py", model, folder, "--threads", str(flags.threads)],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return folder


def run(flags: argparse.Namespace) -> Comparison:
    """Start all, let them take turns, end all."""
    began = time.monotonic()
    comparison = Comparison(
        settings={name: str(value) if isinstance(value, Path) else value for name, value in vars(flags).items()},
        machine_before=asdict(measure_machine(flags.threads)),
    )
    logs = flags.json.parent / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as running:
        contestants = []
        for entry in entries(flags, comparison.not_run):
            try:
                contestant = Contestant(entry, logs, FIRST_TURN)
                running.callback(contestant.leave)
                contestant.turn(**{**WARM_UP, "streams": min(WARM_UP["streams"], max(flags.streams))})
            except ChildProcessError as error:
                comparison.not_run[entry.name] = str(error)
                print(f"{entry.name}: {error}", flush=True)
                continue
            contestants.append(contestant)
            comparison.contestants[entry.name] = {
                "facts": contestant.facts,
                "first_token_s": contestant.first_token_s,
                "starting_peak_bytes": contestant.starting_peak_bytes,
            }
            print(f"{entry.name}: first token after {contestant.first_token_s:.1f} s", flush=True)
        for number in rounds(flags, began):
            take_round(number, contestants, flags, comparison)
            for contestant in contestants:
                comparison.contestants[contestant.entry.name]["peak_bytes"] = contestant.peak_bytes
            comparison.write(flags.json)
    comparison.machine_after = asdict(measure_machine(flags.threads))
    comparison.write(flags.json)
    return comparison


def rounds(flags: argparse.Namespace, began: float) -> Iterator[int]:
    """Round numbers while one more of the last one's length fits into the time, but at least `--min-rounds`."""
    number, seconds = 0, 0.0
    while number < flags.min_rounds or time.monotonic() - began + seconds < flags.minutes * 60:
        round_began = time.monotonic()
        yield number
        seconds = time.monotonic() - round_began
        number += 1


def take_round(number: int, contestants: list[Contestant], flags: argparse.Namespace, comparison: Comparison) -> None:
    """Every contestant at every number of streams; another one begins in every round."""
    first = number % max(1, len(contestants))
    slow = {(turn["contestant"], turn["streams"]) for turn in comparison.turns if turn["seconds"] > LONG_TURN_S}
    for streams in flags.streams:
        for contestant in contestants[first:] + contestants[:first]:
            name = contestant.entry.name
            if (name, streams) in slow:
                continue
            began = time.monotonic()
            figures = contestant.turn(
                streams=streams,
                prompt_tokens=flags.prompt_tokens,
                answer_tokens=flags.answer_tokens,
                seed=1000 * (number + 1) + streams,
            )
            seconds = time.monotonic() - began
            comparison.turns.append({"contestant": name, "round": number, "seconds": seconds, **figures})
            print(
                f"round {number + 1}  {streams:3} streams  {name:24} {figures['decode_tokens_per_s']:8.1f} tokens/s, "
                f"prefill {figures['prefill_tokens_per_s']:7.1f}, first token {figures['first_token_p50_s']:6.2f} s",
                flush=True,
            )


def parse_arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ENGINES, default=list(ENGINES), help="engines, default all")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="streams at once, default 1 8 32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine, default: all cores")
    parser.add_argument("--minutes", type=float, default=22, help="no further round begins after (default: 22)")
    parser.add_argument("--min-rounds", type=int, default=2, help="rounds at least, whatever the time (default: 2)")
    parser.add_argument("--layers", type=int, help="fewer layers, to try things out")
    parser.add_argument("--models", type=Path, default=PEERS / "models", help="where the model's files go")
    parser.add_argument("--json", type=Path, default=RESULTS / "comparison.json", help="where the figures go")
    parser.add_argument("--fast", action="store_true", help="one round with answers of 32 tokens")
    flags = parser.parse_args()
    if flags.fast:
        flags.answer_tokens, flags.minutes, flags.min_rounds = 32, 0, 1
    return flags


def main() -> None:
    """Measure, then say where the figures are."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # ends the engines too
    flags = parse_arguments()
    comparison = run(flags)
    for name, reason in comparison.not_run.items():
        print(f"not run: {name}: {reason}")
    print(f"figures: {flags.json}")


if __name__ == "__main__":
    main()
