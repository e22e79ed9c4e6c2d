"""An engine that may be asleep: requests see one engine, whether or not its model is in memory at the moment.

A sequence that is opened while the model is asleep waits for it; its stream is there at once and gets its first event
when the model has been loaded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import replace

from fastchat.engine.client import EngineClient, EngineLimits, SequenceStream
from fastchat.engine.events import EngineStats, SequenceRequest
from fastchat.errors import ConfigError, FastChatError, UnavailableError
from fastchat.worker.memory_plan import MemoryPlan, ModelShare
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.present_adapters import PresentAdapters
from fastchat.worker.residency import Place, Residency, Ticket


class OnDemandEngine(EngineClient):
    """The engine of one model of a `ModelKeeper`. `limits` are those that its plan promises."""

    def __init__(
        self, key: str, keeper: ModelKeeper, limits: EngineLimits, adapters: PresentAdapters | None = None
    ) -> None:
        super().__init__()
        self.limits = limits
        self._adapters = adapters or PresentAdapters()
        self._key = key
        self._keeper = keeper
        self._num_waiting = 0
        self._failure = None

    async def start(self) -> None:
        """Bring the model into memory now, where there is room, instead of with the first request."""
        residency = self._keeper.residency
        if residency.used_bytes + residency.find(self._key).num_bytes <= residency.budget_bytes:
            await self._keeper.wake(self._key)

    async def close(self) -> None:
        """The keeper closes its engines."""

    @asynccontextmanager
    async def open(self, request: SequenceRequest) -> AsyncIterator[SequenceStream]:
        """As `EngineClient.open`; the model stays in memory until its engine has ended the sequence."""
        self._check(request)
        with self._adapters.used(request.adapter):
            async with self._opened(request) as stream:
                yield stream

    @asynccontextmanager
    async def _opened(self, request: SequenceRequest) -> AsyncIterator[SequenceStream]:
        ticket = self._keeper.take(self._key)
        waiting: asyncio.Task[None] | None = None
        claim = ExitStack()
        claim.callback(self._keeper.give_back, ticket)
        # Not the block but the engine tells when the model is free: all is said though a reader is slow, or a step that
        # has the sequence still runs though its reader has left.
        stream = SequenceStream(on_end=claim.close)
        try:
            if ticket.is_granted:
                self._engine().submit(request, stream)
            else:
                waiting = asyncio.get_running_loop().create_task(self._submit_later(ticket, request, stream))
            yield stream
        finally:
            if waiting is not None:
                waiting.cancel()
                with suppress(asyncio.CancelledError):
                    await waiting
            self.abort(request.sequence_id)
            if not self._is_open(request.sequence_id):
                claim.close()

    def abort(self, sequence_id: str) -> None:
        """End a sequence early; one that still waits for its model ends with its `open` block."""
        engine = self._keeper.engine(self._key)
        if engine is not None:
            engine.abort(sequence_id)

    @property
    def stats(self) -> EngineStats:
        """The condition of the engine there is, with the totals of those before it."""
        stats = self._keeper.stats(self._key)
        return replace(stats, num_waiting=stats.num_waiting + self._num_waiting)

    @property
    def num_open(self) -> int:
        """Those that wait for the model too."""
        engine = self._keeper.engine(self._key)
        return self._num_waiting + (engine.num_open if engine is not None else 0)

    @property
    def is_alive(self) -> bool:
        """A sleeping engine is well; one in memory may have died."""
        engine = self._keeper.engine(self._key)
        return engine is None or engine.is_alive

    @property
    def is_computing(self) -> bool:
        """Whether the model is in memory, so that work that waits should move."""
        return self._keeper.residency.find(self._key).place is Place.AWAKE

    @property
    def awaits_turn(self) -> bool:
        """That of the engine there is."""
        engine = self._keeper.engine(self._key)
        return engine is not None and engine.awaits_turn

    def _send(self, request: SequenceRequest) -> None:
        raise NotImplementedError("sequences are opened, which waits for the model")

    def _send_abort(self, sequence_id: str) -> None:
        raise NotImplementedError("sequences are opened, which waits for the model")

    def _is_open(self, sequence_id: str) -> bool:
        engine = self._keeper.engine(self._key)
        return engine is not None and engine.has_open(sequence_id)

    def _engine(self) -> EngineClient:
        engine = self._keeper.engine(self._key)
        assert engine is not None, f"{self._key} left while it was in use"
        return engine

    async def _submit_later(self, ticket: Ticket, request: SequenceRequest, stream: SequenceStream) -> None:
        """Wait for the model, then go on as if it had been there."""
        self._num_waiting += 1
        try:
            engine = await self._keeper.granted(ticket)
            engine.submit(request, stream)
        except FastChatError as failure:
            stream.fail(failure)
        finally:
            self._num_waiting -= 1


def make_keeper(
    plan: MemoryPlan,
    make_engines: Sequence[Callable[[], EngineClient]],
    *,
    idle_timeout_s: float | None = None,
    pinned: Collection[str] = (),
) -> ModelKeeper:
    """The keeper of the models of `plan`, each called by its first name; `pinned` are such names.

    Raises `ConfigError` where those do not fit together, or leave no room for another model.
    """
    residency = Residency(plan.budget.num_bytes - plan.process_bytes, time.monotonic, idle_timeout_s)
    for share in plan.shares:
        residency.add(share.needs.model.name, share.total_bytes - share.needs.adapter_reserve_bytes)
    keys = [share.needs.model.name for share in plan.shares]
    try:
        for key in pinned:
            residency.pin(key)
        for key in keys:
            residency.check_can_fit(key)
    except UnavailableError as error:
        raise ConfigError(f"--pin: {error.message}") from None
    return ModelKeeper(residency, dict(zip(keys, make_engines, strict=True)))


def promised_limits(share: ModelShare) -> EngineLimits:
    """What the engine of a model will be able to hold, known before it is loaded."""
    needs = share.needs
    return EngineLimits(
        max_context=share.context,
        num_blocks=share.cache_bytes // needs.block_bytes,
        block_size=needs.block_size,
        vocab_size=needs.model.footprint.vocab_size,
        embedding_size=needs.model.footprint.hidden_size,
        device=needs.device,
        dtype=needs.quantization.name if needs.quantization else needs.dtype,
    )
