"""How the next token of a sequence is chosen. Values only: torch-free, validated where they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastchat.errors import InvalidRequestError

MAX_TOP_LOGPROBS = 20
GREEDY_TEMPERATURE = 1e-5
"""Below this temperature the most probable token is taken (FastChat's threshold)."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The sampling options of one sequence; every one is obeyed.

    `top_k` 0 means off, `top_p` 1 and `min_p` 0 mean off. `seed` and `choice` make the random number of every
    position, see `sampler.random_unit`. `stop_token_ids` end the sequence (the id itself is emitted and counted);
    `ignore_eos` drops `eos_token_ids` from them. `top_logprobs` is the number of alternatives to report beside each
    chosen token (0: the chosen one only; None: no log probabilities); `prompt_logprobs` is the same for prompt tokens.
    `max_tokens` 0 computes the prompt and generates nothing.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    choice: int = 0
    eos_token_ids: frozenset[int] = frozenset()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _check(self.max_tokens >= 0, "max_tokens", "must be at least 0")
        _check(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "must be between 0 and max_tokens")
        _check(0.0 <= self.temperature <= 2.0, "temperature", "must be between 0 and 2")
        _check(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")
        _check(self.top_k >= 0, "top_k", "must be at least 1 (or 0 or -1 for off)")
        _check(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1")
        _check(0.0 < self.repetition_penalty <= 10.0, "repetition_penalty", "must be above 0 and at most 10")
        _check(-2.0 <= self.presence_penalty <= 2.0, "presence_penalty", "must be between -2 and 2")
        _check(-2.0 <= self.frequency_penalty <= 2.0, "frequency_penalty", "must be between -2 and 2")
        for token_id, bias in self.logit_bias:
            _check(token_id >= 0, "logit_bias", f"has the token id {token_id}; ids start at 0")
            _check(math.isfinite(bias) and -100 <= bias <= 100, "logit_bias", "values must be between -100 and 100")
        for name in ("top_logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _check(count is None or 0 <= count <= MAX_TOP_LOGPROBS, name, f"must be between 0 and {MAX_TOP_LOGPROBS}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most probable token is taken without a random number."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on which tokens came before."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def ending_token_ids(self) -> frozenset[int]:
        """The ids that end the sequence. `ignore_eos` ignores the checkpoint's own and keeps those asked for."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


def _check(is_valid: bool, param: str, rule: str) -> None:
    """Raise `InvalidRequestError` for `param`. NaN fails every comparison and so every rule."""
    if not is_valid:
        raise InvalidRequestError(f"{param} {rule}.", param=param, code="invalid_value")
