"""One stream of token ids inside the engine: what it has, what is computed, where it is. Torch-free."""

from __future__ import annotations

from enum import Enum

from fastchat.engine.adapters import Adapter
from fastchat.engine.events import FinishReason, SequenceRequest, TokenLogprobs
from fastchat.engine.sampling_params import SamplingParams


class SequenceState(Enum):
    """One member for each place a sequence can be."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """Token ids of prompt and answer, and how far the KV cache covers them.

    Only the scheduler changes `state`, `block_ids` and `num_computed_tokens`; only the engine appends tokens.

        token_ids:   | prompt                | emitted before (resume) | generated here |
                     0                num_prompt_tokens                           len(token_ids)
        KV cache:    | computed ................. | to compute in the next steps ..... |
                     0                   num_computed_tokens

    An adapter's prefix, where there is one, lies in the KV cache in front of all this and is no part of it.
    """

    __slots__ = (
        "adapter",
        "arrival",
        "block_hashes",
        "block_ids",
        "finish_reason",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "prompt_logprobs",
        "request",
        "state",
        "token_ids",
    )

    def __init__(self, request: SequenceRequest, arrival: int, adapter: Adapter | None = None) -> None:
        self.request = request
        self.adapter = adapter
        self.arrival = arrival
        self.token_ids = [*request.prompt_token_ids, *request.emitted_token_ids]
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.num_preemptions = 0
        self.block_ids: list[int] = []
        self.block_hashes: list[bytes] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self.state = SequenceState.WAITING
        self.finish_reason: FinishReason | None = None

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.sequence_id} {self.state.value} computed {self.num_computed_tokens}/{len(self.token_ids)}"
            f" blocks {len(self.block_ids)}>"
        )

    @property
    def sequence_id(self) -> str:
        """The id that the submitter chose."""
        return self.request.sequence_id

    @property
    def sampling(self) -> SamplingParams:
        """How its next token is chosen."""
        return self.request.sampling

    @property
    def num_prefix_slots(self) -> int:
        """Slots of the KV cache in front of the first token, which its adapter fills."""
        return self.adapter.change.num_prefix_slots if self.adapter is not None else 0

    @property
    def cache_salt(self) -> str:
        """What separates its prefix cache from others': keys and values are those of one tenant and one adapter."""
        return f"{self.adapter.number if self.adapter else 0}:{self.request.cache_salt}"

    @property
    def num_output_tokens(self) -> int:
        """Answer tokens so far, those emitted before a resume included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the KV cache does not cover yet; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def may_use_cached_prefix(self) -> bool:
        """Whether the prompt's own outputs (hidden states, log probabilities) are not needed."""
        return not self.request.wants_embedding and self.sampling.prompt_logprobs is None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the prompt's log probabilities are still to be reported; they go out with the first answer token."""
        return self.sampling.prompt_logprobs is not None and self.num_output_tokens == 0

    @property
    def is_decoding(self) -> bool:
        """Whether only the last token is left to compute."""
        return self.num_uncomputed_tokens == 1 and self.num_computed_tokens >= self.num_prompt_tokens

    def finish_reason_after(self, max_context: int) -> FinishReason | None:
        """Why the sequence ends with its last token, or None. `max_context` is in tokens."""
        ends = self.token_ids[-1] in self.sampling.ending_token_ids and self.num_output_tokens > 0
        if ends and self.num_output_tokens > self.sampling.min_tokens:
            return FinishReason.STOP
        if self.num_output_tokens >= self.sampling.max_tokens or len(self.token_ids) >= max_context:
            return FinishReason.LENGTH
        return None
