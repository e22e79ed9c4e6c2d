"""Carries out what `residency.py` decides: brings models into memory, frees them, lets requests wait for them.

One owner of all engines of a worker that may come and go. Loads happen one after the other, because they share the
disk; freeing is done at once. Called by the engines that requests see (`on_demand_engine.py`) and by the operator's
routes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import structlog

from fastchat.engine.client import EngineClient
from fastchat.engine.events import EngineStats
from fastchat.engine.freed_memory import give_back_freed_memory
from fastchat.errors import EngineError, FastChatError
from fastchat.worker.residency import Action, LeaveReason, Load, Place, Residency, Ticket

_TOTALS = (
    "num_steps",
    "progress",
    "num_prompt_tokens",
    "num_cached_tokens",
    "num_generated_tokens",
    "num_preemptions",
    "num_drafted_tokens",
    "num_accepted_tokens",
)

_log = structlog.stdlib.get_logger(__name__)


class ModelKeeper:
    """`make_engine` of a key makes an engine that has not been started; a new one for every load.

    `on_move` is called whenever a model has gone from one place to another, `on_load` when a load has ended, with the
    seconds that it took or None for a failed one, `on_leave` with the reason when a model's memory is free.
    """

    def __init__(self, residency: Residency, make_engine: Mapping[str, Callable[[], EngineClient]]) -> None:
        self.residency = residency
        self._make_engine = make_engine
        self.on_move: Callable[[], None] = lambda: None
        self.on_load: Callable[[str, float | None], None] = lambda _key, _seconds: None
        self.on_leave: Callable[[str, LeaveReason], None] = lambda _key, _reason: None
        self._engines: dict[str, EngineClient] = {}
        self._loading: dict[str, EngineClient] = {}
        self._leaving: dict[str, EngineClient] = {}
        self._places = {resident.key: resident.place for resident in residency}
        self._has_looked = asyncio.Event()
        self._past = dict.fromkeys(make_engine, EngineStats())
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._has_changed = asyncio.Event()
        self._one_load = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        places = {resident.key: resident.place.value for resident in self.residency}
        return f"<ModelKeeper {places}, {len(self._waiting)} waiting>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and free while the block lasts; leaving it closes every engine."""
        watch = asyncio.get_running_loop().create_task(self._watch())
        try:
            yield
        finally:
            tasks = [watch, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for future in self._waiting.values():
                future.cancel()
            for engine in list(self._engines.values()):
                await engine.close()

    def engine(self, key: str) -> EngineClient | None:
        """The engine of a model that is awake."""
        return self._engines.get(key)

    def load_progress(self, key: str) -> float:
        """How much of a model has been read, from 0 to 1."""
        engine = self._engines.get(key) or self._loading.get(key)
        return 0.0 if engine is None else 1.0 if key in self._engines else engine.load_progress

    def stats(self, key: str) -> EngineStats:
        """The condition of the engine there is, with the totals of those that the model had before."""
        engine = self._engines.get(key) or self._leaving.get(key)
        return add_totals(engine.stats if engine is not None else EngineStats(), self._past[key])

    def take(self, key: str, *, more_bytes: int = 0) -> Ticket:
        """A ticket for a model, granted or not; give it back in any case. As `Residency.take`."""
        ticket = self.residency.take(key, more_bytes=more_bytes)
        if not ticket.is_granted:
            self._has_changed.set()
        return ticket

    async def granted(self, ticket: Ticket) -> EngineClient:
        """The model's engine, once the ticket is granted. Raises what made it impossible."""
        if not ticket.is_settled:
            self._waiting[ticket] = asyncio.get_running_loop().create_future()
            self._has_changed.set()
            try:
                await self._waiting[ticket]
            finally:
                del self._waiting[ticket]
        if ticket.failure is not None:
            raise ticket.failure
        return self._engines[ticket.key]

    def give_back(self, ticket: Ticket) -> None:
        """The request has ended, or waits no more."""
        self.residency.give_back(ticket)
        self._has_changed.set()

    async def wake(self, key: str) -> None:
        """Bring a model into memory and leave it there. Raises what loading raises."""
        ticket = self.take(key)
        try:
            await self.granted(ticket)
        finally:
            self.give_back(ticket)

    async def pin(self, key: str) -> None:
        """Bring a model into memory and keep it there. Raises what loading raises, and as `Residency.pin`."""
        ticket = self.take(key)
        try:
            await self.granted(ticket)
            self.residency.pin(key)
        finally:
            self.give_back(ticket)

    async def send_away(self, key: str) -> None:
        """Free a model's memory; returns when that is done, or at once where it must wait until nobody uses it.

        Raises as `Residency.unload`.
        """
        self.residency.unload(key)
        self._has_changed.set()
        resident = self.residency.find(key)
        while resident.is_sent_away and resident.num_granted == 0 and resident.place is not Place.LOADING:
            await self._has_looked.wait()

    async def not_loading(self, key: str) -> None:
        """Wait until a load that is under way has ended, one way or the other."""
        while self.residency.find(key).place is Place.LOADING:
            await self._has_looked.wait()

    def changed(self) -> None:
        """To be called after `residency` was told something by others (pin, unpin, unload, shrink)."""
        self._has_changed.set()

    async def _watch(self) -> None:
        """Act whenever something has changed, or time alone may have changed something."""
        while True:
            self._has_changed.clear()
            for action in self.residency.next_actions():
                task = asyncio.get_running_loop().create_task(self._carry_out(action))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
            for ticket, future in self._waiting.items():
                if ticket.is_settled and not future.done():
                    future.set_result(None)
            self._announce()
            look_at = self.residency.next_look_at()
            timeout_s = None if look_at is None else look_at - self.residency.clock()
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._has_changed.wait()

    def _announce(self) -> None:
        looked, self._has_looked = self._has_looked, asyncio.Event()
        looked.set()
        places = {resident.key: resident.place for resident in self.residency}
        if places != self._places:
            self._places = places
            self.on_move()

    async def _carry_out(self, action: Action) -> None:
        if isinstance(action, Load):
            async with self._one_load:
                await self._load(action.key)
        else:
            engine = self._leaving[action.key] = self._engines.pop(action.key)
            await engine.close()
            self._past[action.key] = self.stats(action.key)
            del self._leaving[action.key]
            self.residency.unloaded(action.key)
            _log.info("model asleep", model=action.key, reason=action.reason)
            self.on_leave(action.key, action.reason)
        self._has_changed.set()

    async def _load(self, key: str) -> None:
        engine = self._loading[key] = self._make_engine[key]()
        began_at = time.monotonic()
        _log.info("loading model", model=key)
        try:
            failure = await self._started(key, engine)
        except BaseException:
            await engine.close()
            raise
        finally:
            del self._loading[key]
        if failure is None:
            self._engines[key] = engine
            self.residency.loaded(key)
            seconds = time.monotonic() - began_at
            _log.info("model awake", model=key, seconds=round(seconds, 1))
            self.on_load(key, seconds)
            return
        await engine.close()
        del engine
        # What was read before it failed is held by the failure's traceback and in circles, and its room is wanted.
        await asyncio.to_thread(give_back_freed_memory)
        self.residency.load_failed(key, failure)
        self.on_load(key, None)

    @staticmethod
    async def _started(key: str, engine: EngineClient) -> FastChatError | None:
        """Start an engine; why that failed, without what it holds."""
        try:
            await engine.start()
        except FastChatError as error:
            _log.error("model could not be loaded", model=key, reason=error.message)
            error.__cause__ = error.__context__ = None
            return error.with_traceback(None)
        except Exception:  # noqa: BLE001 - whatever it is, everybody who waits must hear of it, and the worker lives on
            _log.exception("model could not be loaded", model=key)
            return EngineError(f"{key} could not be loaded; the worker's log has the cause.")
        return None


def add_totals(stats: EngineStats, before: EngineStats) -> EngineStats:
    """`stats` with the totals of `before` added to its own."""
    return replace(stats, **{name: getattr(stats, name) + getattr(before, name) for name in _TOTALS})
