"""All choices of one request over one engine: runs them together, decides when they end, counts what they cost."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from fastchat.api.choice import Choice, ChoicePlan, Delta, Ending, TextRules
from fastchat.api.disconnect import ClientLeftError
from fastchat.api.event_source import EventSource, open_sequences
from fastchat.api.request_context import RequestContext
from fastchat.api.served_model import ServedModel
from fastchat.engine.events import FinishReason, SequenceEvent, SequenceRequest
from fastchat.errors import EngineError, FastChatError, UnavailableError

EndReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request. A prompt counts once, however many choices it has."""

    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """The final fact about a request, also an aborted one. A resumed request's record covers all of it but what the
    record of a worker that shut down has.

    Times count from the moment when its sequences were submitted; None where no token came. Of each choice every wait
    for its next tokens is in `inter_token_latencies_s`; `num_awaited_tokens` came with them.
    """

    request_id: str
    tenant: str
    model: str
    usage: Usage
    reason: EndReason
    duration_s: float
    time_to_first_token_s: float | None = None
    inter_token_latencies_s: Sequence[float] = ()
    num_awaited_tokens: int = 0


RecordHook = Callable[[RequestRecord], None]


def deadline_error() -> UnavailableError:
    """Nobody waits for this answer any more."""
    return UnavailableError("The answer was not ready before the request's deadline.", code="deadline_exceeded")


class Generation:
    """The choices of a request. `running` holds their sequences; `next_deltas` is read inside of it."""

    def __init__(
        self,
        model: ServedModel,
        name: str,
        context: RequestContext,
        plans: Sequence[ChoicePlan],
        rules: TextRules,
        *,
        choices_per_prompt: int,
        cache_salt: str,
        on_record: RecordHook,
    ) -> None:
        self.choices = [Choice(plan, rules, model.tokenizer) for plan in plans]
        self._model = model
        self._name = name
        self._context = context
        self._choices_per_prompt = choices_per_prompt
        self._cache_salt = cache_salt
        self._on_record = on_record
        # A request that comes again (a retry, a resume) may meet its own sequences while they are being aborted.
        prefix = f"{context.request_id}-{secrets.token_hex(4)}"
        self._by_sequence_id = {f"{prefix}-{c.plan.index}": c for c in self.choices if c.ending is None}
        self._source: EventSource | None = None
        self._deadline: float | None = None
        self._began_at = 0.0
        self._first_token_at: float | None = None
        self._last_token_at: dict[str, float] = {}
        self._inter_token_latencies_s: list[float] = []
        self._num_awaited_tokens = 0
        self._has_failed = False

    def __repr__(self) -> str:
        return f"<Generation {self._context.request_id} {self.choices!r}>"

    @property
    def usage(self) -> Usage:
        """What was used so far."""
        firsts = self.choices[:: self._choices_per_prompt]
        return Usage(
            num_prompt_tokens=sum(len(choice.plan.prompt_token_ids) for choice in firsts),
            num_cached_tokens=sum(choice.num_cached_tokens for choice in firsts),
            num_generated_tokens=sum(choice.num_tokens for choice in self.choices),
        )

    @property
    def is_loading(self) -> bool:
        """Whether its model is not in memory now, so that its sequences wait."""
        return not self._model.engine.is_computing

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Submit all choices; leaving the block aborts what still runs and gives the request's one record."""
        self._began_at = time.monotonic()
        if self._context.deadline_s is not None:
            self._deadline = asyncio.get_running_loop().time() + self._context.deadline_s
        try:
            if self._by_sequence_id:
                async with open_sequences(self._model, self._requests()) as self._source:
                    yield
            else:
                yield  # a resumed answer of which only the end is to be told
        except ClientLeftError:
            raise
        except Exception:
            self._has_failed = True
            raise
        finally:
            self._on_record(self._record())

    async def next_deltas(self, stream_interval: int) -> list[Delta]:
        """What is new, at most one delta for each choice; empty when all have ended and all was told.

        Raises `EngineError` or `UnavailableError`, which end the whole request.
        """
        while True:
            due = [choice for choice in self.choices if choice.is_due(stream_interval)]
            if due:
                return [choice.take_delta() for choice in due]
            if all(choice.ending is not None for choice in self.choices):
                return []
            for event in await self._next_events():
                choice = self._by_sequence_id[event.sequence_id]
                if choice.ending is None:
                    self._push(choice, event)

    async def _next_events(self) -> list[SequenceEvent]:
        assert self._source is not None
        try:
            async with asyncio.timeout_at(self._deadline):
                return await self._source.next_events()
        except TimeoutError:
            self._has_failed = True
            raise deadline_error() from None
        except FastChatError:
            self._has_failed = True
            raise

    def _push(self, choice: Choice, event: SequenceEvent) -> None:
        if event.finish_reason is FinishReason.ERROR:
            self._has_failed = True
            raise EngineError(event.error or "the engine failed")
        if event.finish_reason is FinishReason.ABORT:
            self._has_failed = True
            raise UnavailableError("The model's worker is shutting down.", code="shutting_down")
        if event.token_ids:
            self._note_arrival(event)
        choice.push(event)
        if choice.ending is not None and event.finish_reason is None:
            assert self._source is not None
            self._source.drop(event.sequence_id)  # a stop string, which the engine does not know

    def _note_arrival(self, event: SequenceEvent) -> None:
        now = time.monotonic()
        before = self._last_token_at.get(event.sequence_id)
        if before is not None:
            self._inter_token_latencies_s.append(now - before)
            self._num_awaited_tokens += len(event.token_ids)
        elif self._first_token_at is None:
            self._first_token_at = now
        self._last_token_at[event.sequence_id] = now

    def _requests(self) -> list[SequenceRequest]:
        return [
            SequenceRequest(
                sequence_id=sequence_id,
                prompt_token_ids=choice.plan.prompt_token_ids,
                sampling=choice.plan.sampling,
                emitted_token_ids=choice.plan.emitted_token_ids,
                cache_salt=self._cache_salt,
                priority=self._context.priority,
                adapter=self._model.adapter,
            )
            for sequence_id, choice in self._by_sequence_id.items()
        ]

    def _record(self) -> RequestRecord:
        return RequestRecord(
            request_id=self._context.request_id,
            tenant=self._context.tenant,
            model=self._name,
            usage=self._uncounted_usage(),
            reason=self._end_reason(),
            duration_s=time.monotonic() - self._began_at,
            time_to_first_token_s=None if self._first_token_at is None else self._first_token_at - self._began_at,
            inter_token_latencies_s=self._inter_token_latencies_s,
            num_awaited_tokens=self._num_awaited_tokens,
        )

    def _uncounted_usage(self) -> Usage:
        num_counted = self._context.num_counted_tokens
        if num_counted is None:
            return self.usage
        return Usage(0, 0, max(0, self.usage.num_generated_tokens - num_counted))

    def _end_reason(self) -> EndReason:
        if self._has_failed:
            return "error"
        endings = [choice.ending for choice in self.choices]
        if None in endings:
            return "abort"
        return "length" if Ending.LENGTH in endings else "stop"
