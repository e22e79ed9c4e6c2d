"""The events of all sequences of one request, read as one: what arrived together is handed over together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Protocol

from fastchat.api.served_model import ServedModel
from fastchat.engine.client import EngineClient, SequenceStream
from fastchat.engine.events import SequenceEvent, SequenceRequest
from fastchat.errors import FastChatError


class EventSource(Protocol):
    """Where a request's events come from."""

    async def next_events(self) -> list[SequenceEvent]:
        """What has arrived, at least one event, in order for each sequence. Raises as `SequenceStream` does."""

    def drop(self, sequence_id: str) -> None:
        """Read no more of a sequence, which is aborted."""


@asynccontextmanager
async def open_sequences(model: ServedModel, requests: Sequence[SequenceRequest]) -> AsyncIterator[EventSource]:
    """All sequences run at once while the block lasts; leaving it, by any way, aborts what still runs.

    The block must not be inside a generator that yields: a task group lives in it.
    """
    engine = model.engine
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(engine.open(request)) for request in requests]
        if len(streams) == 1:
            yield _OneSequence(engine, streams[0])
            return
        merged = _MergedSequences(engine)
        failure: Exception | None = None
        async with asyncio.TaskGroup() as readers:
            for request, stream in zip(requests, streams, strict=True):
                merged.read(readers, request.sequence_id, stream)
            try:
                yield merged
            except Exception as error:  # noqa: BLE001 - raised below, outside of the task group, which would wrap it
                failure = error
            finally:
                merged.close()
        if failure is not None:
            raise failure


class _OneSequence:
    """The usual case: nothing to merge."""

    def __init__(self, engine: EngineClient, stream: SequenceStream) -> None:
        self._engine = engine
        self._stream = stream

    async def next_events(self) -> list[SequenceEvent]:
        return await self._stream.next_events()

    def drop(self, sequence_id: str) -> None:
        self._engine.abort(sequence_id)


class _MergedSequences:
    """One reading task for each sequence. What is kept is bounded by the answers' own lengths."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine
        self._readers: dict[str, asyncio.Task[None]] = {}
        self._events: list[SequenceEvent] = []
        self._failure: FastChatError | None = None
        self._has_news = asyncio.Event()

    def read(self, group: asyncio.TaskGroup, sequence_id: str, stream: SequenceStream) -> None:
        self._readers[sequence_id] = group.create_task(self._read(stream))

    async def next_events(self) -> list[SequenceEvent]:
        await self._has_news.wait()
        if self._failure is not None:
            raise self._failure
        self._has_news.clear()
        events, self._events = self._events, []
        return events

    def drop(self, sequence_id: str) -> None:
        self._engine.abort(sequence_id)
        self._readers[sequence_id].cancel()

    def close(self) -> None:
        for reader in self._readers.values():
            reader.cancel()

    async def _read(self, stream: SequenceStream) -> None:
        has_ended = False
        while not has_ended:
            try:
                events = await stream.next_events()
            except FastChatError as failure:  # ends the request, which raises it
                self._failure = failure
                self._has_news.set()
                return
            self._events += events
            self._has_news.set()
            has_ended = events[-1].finish_reason is not None
