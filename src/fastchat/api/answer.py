"""One request's answer, whole or as a stream: drives a generation and lets a shape write its JSON.

Shapes are `chat.py` and `completions.py`. The worker's routes run an answer; an API test may as well.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import orjson

from fastchat.api.choice import Choice, ChoicePlan, Delta
from fastchat.api.generation import Generation, Usage
from fastchat.api.off_the_loop import off_the_loop
from fastchat.api.parameters import Ignored
from fastchat.api.protocol import GenerationBody
from fastchat.api.request_context import RequestContext
from fastchat.api.resume import Resume
from fastchat.api.sampling import AnswerLength, choice_sampling
from fastchat.api.served_model import SYSTEM_FINGERPRINT, ServedModel
from fastchat.api.streaming import DONE_EVENT, chunk_event, end_tag, ids_tag, prompt_tag, waiting_comment
from fastchat.engine.sampling_params import SamplingParams

Json = dict[str, Any]  # Any: JSON has any value

LOADING_COMMENT_S = 1.0
PROMPT_COMMENT_S = 10.0
"""How long a stream may be silent before its first token: while its model is loaded, and while its prompt is computed.
"""
_LOGPROBS_SIZE = 100
"""The log probabilities of one place cost as much to write as so many characters of text."""


class AnswerShape(Protocol):
    """How a route writes the choices of its answers."""

    whole_kind: str
    """`object` of a whole answer."""
    chunk_kind: str
    """`object` of a chunk."""
    opens_at_once: bool
    """Whether every choice's first chunk goes out before there is any text."""

    def opening(self, choice: Choice) -> Json | None:
        """The choice's first chunk, before any text; None when there is none."""

    def chunk(self, choice: Choice, delta: Delta) -> Json:
        """A chunk with text, or the last one, which has an ending."""

    def whole(self, choice: Choice, delta: Delta) -> Json:
        """The choice of a whole answer; `delta` is all of it."""

    def extras(self, choices: Sequence[Choice]) -> Json:
        """Further fields of a whole answer."""


@dataclass(frozen=True, slots=True)
class AnswerHead:
    """What all chunks of an answer have in common."""

    answer_id: str
    created: int
    model: str
    is_stream: bool = False
    includes_usage: bool = False
    wants_tags: bool = False
    stream_interval: int = 1


def answer_head(prefix: str, body: GenerationBody, model: ServedModel, context: RequestContext) -> AnswerHead:
    """What a request's chunks have in common; its id is `prefix-` and the request's own."""
    return AnswerHead(
        answer_id=f"{prefix}-{context.request_id}",
        created=context.created,
        model=body.model,
        is_stream=bool(body.stream),
        includes_usage=body.includes_usage,
        wants_tags=context.wants_tags,
        stream_interval=model.stream_interval,
    )


class Answer:
    """Use as `async with answer.running(): ...` around `whole()` or `events()`."""

    def __init__(self, head: AnswerHead, shape: AnswerShape, generation: Generation, ignored: Ignored) -> None:
        self.ignored = ignored
        self._head = head
        self._shape = shape
        self._generation = generation
        self._unopened = {choice.plan.index for choice in generation.choices if not choice.plan.is_begun}

    @property
    def is_stream(self) -> bool:
        """Whether the client asked for events."""
        return self._head.is_stream

    def running(self) -> AbstractAsyncContextManager[None]:
        """The time in which sequences run; leaving it, by any way, aborts them."""
        return self._generation.running()

    async def whole(self) -> bytes:
        """The answer as one JSON body."""
        deltas: dict[int, Delta] = {}
        while new := await self._generation.next_deltas(sys.maxsize):
            deltas |= {delta.choice: delta for delta in new}
        return await off_the_loop(lambda: self._whole_body(deltas), size=self._size(deltas))

    def _whole_body(self, deltas: Mapping[int, Delta]) -> bytes:
        choices = self._generation.choices
        body = self._common(self._shape.whole_kind)
        body["choices"] = [self._shape.whole(choice, deltas[choice.plan.index]) for choice in choices]
        body["usage"] = usage_json(self._generation.usage)
        return orjson.dumps(body | self._shape.extras(choices))

    def _size(self, deltas: Mapping[int, Delta]) -> int:
        """About what a body costs to write, in characters."""
        num_described = sum(len(choice.prompt_logprobs) for choice in self._generation.choices)
        num_described += sum(len(delta.logprobs) for delta in deltas.values())
        return sum(len(delta.text) for delta in deltas.values()) + _LOGPROBS_SIZE * num_described

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; each item is what became known together. Errors are raised, not written."""
        if self._shape.opens_at_once:
            opening = b"".join(self._opening(choice) for choice in self._generation.choices)
            if opening:
                yield opening
        while (deltas := await self._first_deltas()) is None:
            yield waiting_comment(self._head.model, is_loading=self._generation.is_loading)
        while deltas:
            yield b"".join(self._delta_events(delta) for delta in deltas)
            deltas = await self._generation.next_deltas(self._head.stream_interval)
        if self._head.includes_usage:
            usage = usage_json(self._generation.usage)
            yield chunk_event({**self._common(self._shape.chunk_kind), "choices": [], "usage": usage}) + DONE_EVENT
        else:
            yield DONE_EVENT

    async def _first_deltas(self) -> list[Delta] | None:
        """The first deltas; None where they take so long that the client should hear something."""
        patience_s = LOADING_COMMENT_S if self._generation.is_loading else PROMPT_COMMENT_S
        try:
            async with asyncio.timeout(patience_s):
                return await self._generation.next_deltas(self._head.stream_interval)
        except TimeoutError:
            return None

    def _delta_events(self, delta: Delta) -> bytes:
        """Text in one event and the ending in the next; one event where the end brings no text."""
        choice = self._generation.choices[delta.choice]
        events = self._opening(choice)
        if delta.text and delta.ending is not None:
            text = replace(delta, ending=None, stop_reason=None)
            events += self._event(choice, self._shape.chunk(choice, text), delta.offset, delta.token_ids)
            offset = delta.offset + len(delta.token_ids)
            delta = replace(delta, offset=offset, token_ids=(), text="", logprobs=(), text_offsets=())
        chunk, is_end = self._shape.chunk(choice, delta), delta.ending is not None
        return events + self._event(choice, chunk, delta.offset, delta.token_ids, is_end=is_end)

    def _opening(self, choice: Choice) -> bytes:
        if choice.plan.index not in self._unopened:
            return b""
        chunk = self._shape.opening(choice)
        return b"" if chunk is None else self._event(choice, chunk, 0, ())

    def _event(
        self, choice: Choice, chunk: Json, offset: int, token_ids: Sequence[int], *, is_end: bool = False
    ) -> bytes:
        body = {**self._common(self._shape.chunk_kind), "choices": [chunk]}
        if self._head.includes_usage:
            body["usage"] = None
        tags = b""
        if self._head.wants_tags:
            if choice.plan.index in self._unopened:
                tags = prompt_tag(choice.plan.index, choice.plan.prompt_token_ids)
            tags += ids_tag(choice.plan.index, offset, token_ids)
            if is_end:
                tags += end_tag(choice.plan.index)
        self._unopened.discard(choice.plan.index)
        return chunk_event(body, tags)

    def _common(self, kind: str) -> Json:
        return {
            "id": self._head.answer_id,
            "object": kind,
            "created": self._head.created,
            "model": self._head.model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }


def usage_json(usage: Usage) -> Json:
    """`usage` with its details."""
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_generated_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def plan_choices(
    prompts: Sequence[tuple[int, ...]],
    base: SamplingParams,
    length: AnswerLength,
    *,
    choices_per_prompt: int,
    max_context: int,
    resume: Resume,
) -> list[ChoicePlan]:
    """One plan for each choice, by index = prompt * n + choice. Raises where an answer does not fit the context."""
    plans: list[ChoicePlan] = []
    for number, prompt in enumerate(prompts):
        for choice in range(choices_per_prompt):
            index = number * choices_per_prompt + choice
            resumed = resume.choice(index)
            prompt_token_ids = resumed.prompt_token_ids if resumed else prompt
            max_tokens = length.max_tokens(len(prompt_token_ids), max_context)
            plans.append(
                ChoicePlan(
                    index=index,
                    prompt_token_ids=prompt_token_ids,
                    sampling=choice_sampling(base, max_tokens=max_tokens, choice=choice),
                    emitted_token_ids=resumed.emitted_token_ids if resumed else (),
                    is_begun=resumed is not None,
                    is_end_told=resumed is not None and resumed.is_end_told,
                )
            )
    return plans
