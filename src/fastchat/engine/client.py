"""How asynchronous code talks to an engine, wherever the engine runs: in a thread or in a spawned process.

One interface, two implementations (`thread_client.py`, `process_client.py`), one test for both. Torch-free.
"""

from __future__ import annotations

import asyncio
import itertools
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastchat.engine.adapters import AdapterOrder
from fastchat.engine.events import EngineStats, SequenceEvent, SequenceRequest
from fastchat.errors import CheckpointError, ContextLengthError, EngineError, FastChatError, InvalidRequestError

ENGINE_THREAD_NAME = "engine"
"""How the names of threads begin that run an engine."""
CLOSE_TIMEOUT_S = 10.0
"""How long an engine may go on with its step once it is told to stop."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What an engine can hold. `max_context` is in tokens, prompt and answer together; `device` as torch names it.

    `embedding_size` is the length of the vectors that it gives.
    """

    max_context: int
    num_blocks: int
    block_size: int
    vocab_size: int
    embedding_size: int
    device: str
    dtype: str


class SequenceStream:
    """The events of one submitted sequence, in order. Ends after the event that has a `finish_reason`.

    `on_end` is called when no more will come, whether or not anybody has read them.
    """

    def __init__(self, on_end: Callable[[], None] = lambda: None) -> None:
        self._on_end = on_end
        self._events: list[SequenceEvent] = []
        self._failure: FastChatError | None = None
        self._has_news = asyncio.Event()

    async def next_events(self) -> list[SequenceEvent]:
        """All events that have arrived since the last call; waits for at least one.

        Raises `EngineError` when the engine died.
        """
        await self._has_news.wait()
        self._has_news.clear()
        if not self._events:
            assert self._failure is not None
            self._has_news.set()
            raise self._failure
        events, self._events = self._events, []
        if self._failure is not None:
            self._has_news.set()
        return events

    def put(self, event: SequenceEvent) -> None:
        """Called by the client that owns the stream."""
        self._events.append(event)
        self._has_news.set()
        if event.finish_reason is not None:
            self._on_end()

    def fail(self, failure: FastChatError) -> None:
        """No more events will come."""
        self._failure = failure
        self._has_news.set()
        self._on_end()


class EngineClient(ABC):
    """Submit sequences to one engine and read their events. Owned by one event loop."""

    limits: EngineLimits
    load_progress: float = 0.0
    """How much of the model has been read while `start` runs, from 0 to 1. Set from any thread."""

    def __init__(self) -> None:
        self._streams: dict[str, SequenceStream] = {}
        self._orders: dict[int, asyncio.Future[None]] = {}
        self._order_numbers = itertools.count(1)
        self._failure: FastChatError | None = EngineError("the engine has not been started")
        self._last_stats = EngineStats()

    @abstractmethod
    async def start(self) -> None:
        """Start the engine and wait until it can take sequences. Raises `EngineError` or `CheckpointError`."""

    @abstractmethod
    async def close(self) -> None:
        """Abort what runs, stop the engine and free what it holds. May be called twice."""

    @abstractmethod
    def _send(self, request: SequenceRequest) -> None:
        """Bring a checked request to the engine."""

    @abstractmethod
    def _send_abort(self, sequence_id: str) -> None:
        """Bring an abort to the engine."""

    def _send_order(self, order: AdapterOrder) -> None:
        """Bring an order to the engine, which answers it by `_settle`. Here: one that takes no adapters."""
        self._settle(order.number, CheckpointError(f"{order.source or order.name}: this engine takes no adapters"))

    def submit(self, request: SequenceRequest, stream: SequenceStream | None = None) -> SequenceStream:
        """Hand a sequence over; returns at once. Prefer `open`, which cannot forget the abort.

        A `stream` that somebody reads already gets the events instead of a new one.

        Raises `InvalidRequestError` where the request does not fit `limits`, `EngineError` when the engine is gone.
        """
        if self._failure is not None:
            raise self._failure
        self._check(request)
        stream = stream or SequenceStream()
        self._streams[request.sequence_id] = stream
        self._send(request)
        return stream

    def abort(self, sequence_id: str) -> None:
        """End a sequence early: its blocks are free within a step and its stream ends with `ABORT`."""
        if sequence_id in self._streams and self._failure is None:
            self._send_abort(sequence_id)

    @asynccontextmanager
    async def open(self, request: SequenceRequest) -> AsyncIterator[SequenceStream]:
        """A sequence that lives as long as the `async with` block: leaving it, by any way, aborts what still runs."""
        stream = self.submit(request)
        try:
            yield stream
        finally:
            self.abort(request.sequence_id)

    async def add_adapter(self, name: str, source: str) -> None:
        """Load an adapter between two steps; sequences may ask for it from then on.

        Raises `CheckpointError` for what does not fit the model, and then all is as before; `EngineError` when the
        engine is gone.
        """
        await self._order(AdapterOrder(next(self._order_numbers), name, source))

    async def remove_adapter(self, name: str) -> None:
        """Let no sequence ask for an adapter any more; what runs with it holds it to its end.

        An unknown name is no fault. Raises `EngineError` when the engine is gone.
        """
        await self._order(AdapterOrder(next(self._order_numbers), name))

    @property
    def stats(self) -> EngineStats:
        """The engine's latest condition; never blocks."""
        return self._last_stats

    @property
    def num_open(self) -> int:
        """Sequences that were submitted and whose end has not come. Stats tell of one only after a step."""
        return len(self._streams)

    def has_open(self, sequence_id: str) -> bool:
        """Whether a sequence was submitted and its end has not come."""
        return sequence_id in self._streams

    @property
    def is_alive(self) -> bool:
        """False before the start, and once the engine has died or was closed."""
        return self._failure is None

    @property
    def is_computing(self) -> bool:
        """Whether what waits should move; False while a model waits for its memory."""
        return True

    @property
    def awaits_turn(self) -> bool:
        """Whether another engine has the device now, so that this one cannot move."""
        return False

    def _deliver(self, events: list[SequenceEvent], stats: EngineStats) -> None:
        """Hand one step's events to their streams. Called on the event loop."""
        self._last_stats = stats
        for event in events:
            stream = self._streams.get(event.sequence_id)
            if stream is not None:
                stream.put(event)
                if event.finish_reason is not None:
                    del self._streams[event.sequence_id]

    async def _order(self, order: AdapterOrder) -> None:
        if self._failure is not None:
            raise self._failure
        settled = self._orders[order.number] = asyncio.get_running_loop().create_future()
        try:
            self._send_order(order)
            await settled
        finally:
            del self._orders[order.number]

    def _settle(self, number: int, failure: FastChatError | None) -> None:
        """An order has been carried out, or not. Called on the event loop."""
        settled = self._orders.get(number)
        if settled is None or settled.done():
            return  # nobody waits for it any more
        if failure is None:
            settled.set_result(None)
        else:
            settled.set_exception(failure)

    def _fail(self, failure: FastChatError) -> None:
        """The engine is gone: every open stream and order ends with `failure`. The first failure stays."""
        if self._failure is None:
            self._failure = failure
        for stream in self._streams.values():
            stream.fail(failure)
        self._streams.clear()
        for number in list(self._orders):
            self._settle(number, failure)

    def _check(self, request: SequenceRequest) -> None:
        """What only the engine knows: its vocabulary and its room."""
        if request.sequence_id in self._streams:
            raise InvalidRequestError(f"The id {request.sequence_id} is in use.", param="request_id")
        if not request.prompt_token_ids:
            raise InvalidRequestError("The prompt is empty; give at least one token.", param="prompt")
        vocab_size = self.limits.vocab_size
        for token_ids in (request.prompt_token_ids, request.emitted_token_ids):
            if token_ids and not 0 <= min(token_ids) <= max(token_ids) < vocab_size:
                raise InvalidRequestError(f"Token ids must be between 0 and {vocab_size - 1}.", param="prompt")
        for token_id, _ in request.sampling.logit_bias:
            if token_id >= vocab_size:
                raise InvalidRequestError(
                    f"logit_bias has the token id {token_id}; the vocabulary ends at {vocab_size - 1}.",
                    param="logit_bias",
                )
        if request.has_ended:
            raise InvalidRequestError("The emitted ids are a whole answer; nothing is left to compute.", param="resume")
        num_prompt_tokens = len(request.prompt_token_ids)
        if num_prompt_tokens + request.sampling.max_tokens > self.limits.max_context:
            raise ContextLengthError(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=request.sampling.max_tokens,
                max_context=self.limits.max_context,
                param="prompt",
            )
