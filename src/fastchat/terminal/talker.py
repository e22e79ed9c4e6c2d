"""Who answers in the terminal: a model loaded here or a running server. One interface, one test for both.

Both are given the body of a chat completion and give its events, so the text on the screen is the API's.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from fastchat.api.answer_reader import AnswerReader
from fastchat.errors import RequestError, UnavailableError
from fastchat.terminal.conversation import Turn

CONTEXT_CODE = "context_length_exceeded"

Json = dict[str, Any]  # Any: JSON has any value


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """How answers are made; None leaves a value to the model. `max_tokens` is what an answer has at most."""

    temperature: float | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A conversation that waits for its next answer; an empty system message is none."""

    turns: tuple[Turn, ...]
    system_message: str = ""
    options: AnswerOptions = AnswerOptions()

    def messages(self) -> list[Json]:
        """The conversation as OpenAI's messages."""
        system = [{"role": "system", "content": self.system_message}] if self.system_message else []
        return [*system, *({"role": turn.speaker, "content": turn.text} for turn in self.turns)]

    def body(self, model_name: str, *, max_tokens: int | None) -> Json:
        """The request for a streamed chat completion."""
        options = self.options
        given = {
            "temperature": options.temperature,
            "top_p": options.top_p,
            "repetition_penalty": options.repetition_penalty,
            "max_tokens": max_tokens,
            "seed": options.seed,
        }
        return {
            "model": model_name,
            "messages": self.messages(),
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in given.items() if value is not None},
        }


@dataclass(frozen=True, slots=True)
class Answered:
    """A whole answer. Counts are in tokens, None where the server does not tell; times in seconds."""

    text: str
    finish_reason: str | None
    num_prompt_tokens: int | None
    num_generated_tokens: int | None
    duration_s: float
    time_to_first_text_s: float


class Talker(ABC):
    """Answers questions one at a time. Used on one event loop; `start` first and `close` at the end."""

    model_name: str
    template_name: str
    roles: tuple[str, str]

    @abstractmethod
    async def start(self) -> None:
        """Make ready to answer; `model_name`, `template_name` and `roles` are known after it."""

    @abstractmethod
    async def close(self) -> None:
        """Free what `start` took. May be called twice, and without `start`."""

    @abstractmethod
    async def prompt_of(self, question: Question) -> str:
        """What the model is given to read, for a developer's eyes."""

    @abstractmethod
    def _open(self, body: Json) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        """The events of an answer; leaving the block, by any way, ends the work on it."""

    async def answer(self, question: Question, on_text: Callable[[str], None]) -> Answered:
        """Ask, and hand each piece of text over as it comes. Cancelling it ends the work on the answer.

        Where the longest answer asked for does not fit the context any more, what is left of it is the limit.
        Raises `RequestError` for a question that cannot be answered, `UnavailableError` or `EngineError` otherwise.
        """
        max_tokens = question.options.max_tokens
        try:
            return await self._ask(question, max_tokens, on_text)
        except RequestError as error:
            if max_tokens is None or error.code != CONTEXT_CODE:
                raise
        return await self._ask(question, None, on_text)

    async def _ask(self, question: Question, max_tokens: int | None, on_text: Callable[[str], None]) -> Answered:
        reader = AnswerReader()
        texts: list[str] = []
        began_at = time.monotonic()
        first_text_at: float | None = None
        async with self._open(question.body(self.model_name, max_tokens=max_tokens)) as events:
            async for received in events:
                text = reader.push(received)
                if text:
                    first_text_at = first_text_at or time.monotonic()
                    texts.append(text)
                    on_text(text)
                if reader.is_done:
                    break
        if not reader.is_done and reader.finish_reason is None:
            raise UnavailableError("The connection ended in the middle of the answer.")
        ended_at = time.monotonic()
        return Answered(
            text="".join(texts),
            finish_reason=reader.finish_reason,
            num_prompt_tokens=reader.num_prompt_tokens,
            num_generated_tokens=reader.num_generated_tokens,
            duration_s=ended_at - began_at,
            time_to_first_text_s=(first_text_at or ended_at) - began_at,
        )
