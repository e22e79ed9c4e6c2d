"""What every engine of the comparison speaks: one JSON line in, one JSON line out. Standard library only.

An adapter (`run_*.py`, each in the virtual environment of its engine) makes a `Peer` and hands it to `serve`. The clock
is read here, the same way for all: an engine only says which streams got a token.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

FIRST_TOKEN_ID = 300
"""Below are the special tokens of some families."""


@dataclass(frozen=True)
class Facts:
    """What a loaded engine says of itself; bytes are as it holds them in memory, 0 where it does not know."""

    version: str
    settings: str
    weight_bytes: int
    read_bytes: int
    """Weights that a decode step reads: all but an embedding that is only looked up."""
    cache_bytes: int
    vocab_size: int


@dataclass(frozen=True)
class Turn:
    """How fast some streams that began together were."""

    streams: int
    prompt_tokens: int
    answer_tokens: int
    prefill_tokens_per_s: float
    """All prompt tokens over the time until every stream had its first token."""
    decode_tokens_per_s: float
    """Tokens after that moment over the time after it; 0 for answers of one token."""
    whole_tokens_per_s: float
    """All answer tokens over all time."""
    first_token_p50_s: float
    first_token_p99_s: float
    between_tokens_p50_s: float
    between_tokens_p99_s: float


class Peer(Protocol):
    """One loaded engine."""

    facts: Facts

    def generate(self, prompts: list[list[int]], answer_tokens: int) -> Iterator[list[int]]:
        """Greedy answers of exactly so many tokens, the end of text ignored; prompts never share a beginning.

        Yields after each step the numbers of the streams that got a token, as often as they got one.
        """


def serve(load: Callable[[argparse.Namespace], Peer]) -> None:
    """Load, then answer `{"streams", "prompt_tokens", "answer_tokens", "seed"}` lines until the input ends.

    What an engine prints goes to the error stream: the output is for the answers.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a checkpoint's folder, or a GGUF file")
    parser.add_argument("--weights", required=True, help="bfloat16, int8 or int4")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--streams", type=int, required=True, help="most streams at once")
    parser.add_argument("--context", type=int, required=True, help="most tokens of one stream")
    peer = load(parser.parse_args())
    answers.write(json.dumps(asdict(peer.facts)) + "\n")
    for line in sys.stdin:
        answers.write(json.dumps(asdict(take_turn(peer, **json.loads(line)))) + "\n")
    # Some engines hang while they are taken apart, and nothing is left to be saved.
    os._exit(0)


def take_turn(peer: Peer, streams: int, prompt_tokens: int, answer_tokens: int, seed: int) -> Turn:
    """Run the streams of one turn to their end."""
    prompts = random_prompts(streams, prompt_tokens, peer.facts.vocab_size, seed)
    seen: list[list[float]] = [[] for _ in prompts]
    began = time.perf_counter()
    for numbers in peer.generate(prompts, answer_tokens):
        now = time.perf_counter() - began
        for number in numbers:
            seen[number].append(now)
    if any(len(times) != answer_tokens for times in seen):
        raise RuntimeError(f"answers of {sorted({len(times) for times in seen})} tokens instead of {answer_tokens}")
    return summary(seen, prompt_tokens)


def random_prompts(streams: int, prompt_tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """The same prompts for every engine; no two share a beginning."""
    draw = random.Random(seed)
    return [[draw.randrange(FIRST_TOKEN_ID, vocab_size) for _ in range(prompt_tokens)] for _ in range(streams)]


def summary(seen: list[list[float]], prompt_tokens: int) -> Turn:
    """From the times at which each stream's tokens were seen, in seconds since the beginning."""
    firsts = sorted(times[0] for times in seen)
    gaps = sorted(after - before for times in seen for before, after in pairwise(times)) or [0.0]
    prefilled = firsts[-1]
    ended = max(times[-1] for times in seen)
    later = sum(moment > prefilled for times in seen for moment in times)
    return Turn(
        streams=len(seen),
        prompt_tokens=prompt_tokens,
        answer_tokens=len(seen[0]),
        prefill_tokens_per_s=len(seen) * prompt_tokens / prefilled,
        decode_tokens_per_s=later / (ended - prefilled) if later else 0.0,
        whole_tokens_per_s=sum(map(len, seen)) / ended,
        first_token_p50_s=statistics.median(firsts),
        first_token_p99_s=percentile(firsts, 0.99),
        between_tokens_p50_s=statistics.median(gaps),
        between_tokens_p99_s=percentile(gaps, 0.99),
    )


def percentile(ascending: list[float], share: float) -> float:
    """The smallest value that this share does not exceed."""
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
