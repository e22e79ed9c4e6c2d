"""One choice of an answer: its ids become text, its stop strings are watched, its end is decided.

All of it is a function of the ids alone, one after the other. So it does not matter which ids arrived together, and a
resumed choice that is given the ids its client has got stands exactly where the first one stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from fastchat.api.stop_strings import StopMatcher, StopStrings
from fastchat.engine.events import FinishReason, SequenceEvent, TokenLogprobs
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.detokenizer import Detokenizer
from fastchat.models.interface import Tokenizer


class Ending(Enum):
    """Why a choice ended by itself, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TextRules:
    """How ids become the text of an answer."""

    stops: StopStrings
    keeps_stop: bool = False
    skips_special_tokens: bool = True
    strips_leading_space: bool = False


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """What to compute for one choice.

    Its client has got `emitted_token_ids`, any event at all if `is_begun`, and the last one if `is_end_told`.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    emitted_token_ids: tuple[int, ...] = ()
    is_begun: bool = False
    is_end_told: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new of one choice. `offset` counts the ids before; `text_offsets` the characters before each id."""

    choice: int
    offset: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    text_offsets: tuple[int, ...] = ()
    ending: Ending | None = None
    stop_reason: str | int | None = None


class Choice:
    """Follows one sequence's events and hands out deltas."""

    def __init__(self, plan: ChoicePlan, rules: TextRules, tokenizer: Tokenizer) -> None:
        self.plan = plan
        self.ending: Ending | None = None
        self.stop_reason: str | int | None = None
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._rules = rules
        self._detokenizer = Detokenizer(
            tokenizer, plan.prompt_token_ids, skip_special_tokens=rules.skips_special_tokens
        )
        self._matcher = StopMatcher(rules.stops, keeps_stop=rules.keeps_stop)
        self._has_text = not rules.strips_leading_space
        self._num_characters = 0
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._text_offsets: list[int] = []
        self._was_ending_told = plan.is_end_told
        for token_id in plan.emitted_token_ids:
            if self.ending is None:
                self._take(token_id)
        self._forget_pending()

    def __repr__(self) -> str:
        state = self.ending.value if self.ending else "running"
        return f"<Choice {self.plan.index} {state} {self.num_tokens} tokens>"

    def push(self, event: SequenceEvent) -> None:
        """Take an event of the choice's sequence. Ids behind its end are not taken."""
        self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached_tokens)
        self.prompt_logprobs = event.prompt_logprobs or self.prompt_logprobs
        for position, token_id in enumerate(event.token_ids):
            if self.ending is not None:
                return
            self._take(token_id)
            if event.logprobs:
                self._logprobs.append(event.logprobs[position])
        if self.ending is None and event.finish_reason is not None:
            self._end(Ending.STOP if event.finish_reason is FinishReason.STOP else Ending.LENGTH)

    def is_due(self, stream_interval: int) -> bool:
        """Whether a delta should go out: enough ids that became text, or the end."""
        if self.ending is not None:
            return not self._was_ending_told
        if self.plan.sampling.prompt_logprobs is not None and not (self.prompt_logprobs or self.plan.is_begun):
            return False  # they go out first, and not again where the answer goes on
        return len(self._token_ids) >= stream_interval and bool(self._texts)

    def take_delta(self) -> Delta:
        """Everything new since the last delta."""
        delta = Delta(
            choice=self.plan.index,
            offset=self.num_tokens - len(self._token_ids),
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            logprobs=tuple(self._logprobs),
            text_offsets=tuple(self._text_offsets),
            ending=self.ending,
            stop_reason=self.stop_reason,
        )
        self._was_ending_told = self.ending is not None
        self._forget_pending()
        return delta

    def _take(self, token_id: int) -> None:
        sampling = self.plan.sampling
        self.num_tokens += 1
        self._token_ids.append(token_id)
        self._text_offsets.append(self._num_characters)
        ends = token_id in sampling.ending_token_ids and self.num_tokens > sampling.min_tokens
        if not ends or self._rules.keeps_stop:
            self._add_text(self._detokenizer.push((token_id,)))
        if self.ending is not None:
            return
        if ends:
            self._end(Ending.STOP)
            if token_id in sampling.stop_token_ids and self.stop_reason is None:
                self.stop_reason = token_id
        elif self.num_tokens >= sampling.max_tokens:
            self._end(Ending.LENGTH)

    def _end(self, ending: Ending) -> None:
        """The last text: what was held back, and the rest of an incomplete character."""
        self._add_text(self._detokenizer.finish())
        if self.ending is None:
            self._release(self._matcher.finish())
            self.ending = ending

    def _add_text(self, text: str) -> None:
        """Text through the stop matcher; within the first `min_tokens` ids no stop string counts.

        Stop strings are looked for in the text that the client gets, so leading white space is dropped before: a model
        that begins each answer with a line break would otherwise never answer a client that stops at line breaks.
        """
        self._num_characters += len(text)
        if not self._has_text:
            text = text.lstrip()
            self._has_text = bool(text)
        if self.num_tokens <= self.plan.sampling.min_tokens:
            self._release(text)
            return
        matched = self._matcher.push(text)
        self._release(matched.text)
        if matched.stop is not None:
            self.ending = Ending.STOP
            self.stop_reason = matched.stop

    def _release(self, text: str) -> None:
        if text:
            self._texts.append(text)

    def _forget_pending(self) -> None:
        self._token_ids, self._texts, self._logprobs, self._text_offsets = [], [], [], []
