"""What goes into an engine and what comes out of it: values that cross a thread or a process. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fastchat.engine.sampling_params import SamplingParams


class FinishReason(Enum):
    """Why a sequence ended. One member for each way a sequence can end."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One stream of token ids to compute.

    `emitted_token_ids` are answer ids that an earlier engine already gave out: the sequence goes on after them, and
    `sampling.max_tokens` still counts them. `cache_salt` separates the prefix caches of tenants. A lower `priority`
    runs first. `adapter` names one of the engine's adapters; "" is the model itself. With
    `wants_embedding` the prompt is computed, its mean hidden state is returned, and nothing is generated.
    """

    sequence_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    emitted_token_ids: tuple[int, ...] = ()
    cache_salt: str = ""
    priority: int = 0
    wants_embedding: bool = False
    adapter: str = ""

    @property
    def has_ended(self) -> bool:
        """Whether the emitted ids are a whole answer already, so that nothing is left to compute."""
        emitted, sampling = self.emitted_token_ids, self.sampling
        ends = bool(emitted) and emitted[-1] in sampling.ending_token_ids and len(emitted) > sampling.min_tokens
        return ends or (bool(emitted) and len(emitted) >= sampling.max_tokens)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log probabilities of one place, of the model's own distribution (before penalties and temperature).

    `logprob` is None for the first token of a prompt, which nothing predicts. `top` holds (token id, log probability),
    the most probable first.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SequenceEvent:
    """What one step did for one sequence: new ids, and at the end the reason.

    `logprobs` is parallel to `token_ids` where asked for, else empty. `prompt_logprobs` comes with the first event,
    `embedding` (the mean of the prompt's final hidden states, not normalised) and `error` with the last.
    `num_cached_tokens` is how many prompt tokens the prefix cache held.
    """

    sequence_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    embedding: tuple[float, ...] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's condition after a step. `num_steps` and `progress` only grow; token counts are totals.

    `progress` also moves inside a step (once per attention layer), so a long step is told from a hung one.
    """

    num_steps: int = 0
    progress: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_queued_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
