"""An engine on a thread of this process: the default on CPU, where torch's products release the interpreter."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import replace

from fastchat.engine.adapters import AdapterOrder
from fastchat.engine.client import CLOSE_TIMEOUT_S, ENGINE_THREAD_NAME, EngineClient
from fastchat.engine.engine import Engine
from fastchat.engine.engine_loop import Abort, EngineLoop, Stop
from fastchat.engine.events import EngineStats, SequenceEvent, SequenceRequest
from fastchat.engine.freed_memory import give_back_freed_memory
from fastchat.engine.turns import Turns
from fastchat.errors import EngineError, FastChatError

logger = logging.getLogger(__name__)


class ThreadEngineClient(EngineClient):
    """Makes the engine on its thread, runs it there, and crosses into the event loop once per step.

    Engines that share a device share `turns`.
    """

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        *,
        name: str = "",
        close_timeout_s: float = CLOSE_TIMEOUT_S,
        turns: Turns | None = None,
    ) -> None:
        super().__init__()
        self._turns = turns
        self._make_engine = make_engine
        self._close_timeout_s = close_timeout_s
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"{ENGINE_THREAD_NAME} {name}", daemon=True)
        self._engine: Engine | None = None
        self._engine_loop: EngineLoop | None = None

    async def start(self) -> None:
        """Start the thread and wait until the model is loaded there; what loading raises is raised here."""
        self._event_loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._event_loop.create_future()
        self._has_ended = asyncio.Event()
        self._thread.start()
        await self._started
        self._failure = None

    async def close(self) -> None:
        """Stop after the current step. A thread cannot be killed: one that does not end in time is left to itself."""
        self._is_closing.set()
        if self._engine_loop is None:
            return
        self._engine_loop.inbox.put(Stop())
        try:
            await asyncio.wait_for(self._has_ended.wait(), self._close_timeout_s)
        except TimeoutError:
            logger.warning("the engine does not stop; its thread is left behind name=%s", self._thread.name)
            self._end(EngineError("the engine was closed"))
        else:
            await asyncio.to_thread(self._thread.join)
            await asyncio.to_thread(give_back_freed_memory)

    @property
    def stats(self) -> EngineStats:
        """The condition after the last step, with the progress of the current one."""
        return self._last_stats if self._engine is None else replace(self._last_stats, progress=self._engine.progress)

    @property
    def awaits_turn(self) -> bool:
        """As its loop says."""
        return self._engine_loop is not None and self._engine_loop.awaits_turn

    def _send(self, request: SequenceRequest) -> None:
        assert self._engine_loop is not None
        self._engine_loop.inbox.put(request)

    def _send_abort(self, sequence_id: str) -> None:
        assert self._engine_loop is not None
        self._engine_loop.inbox.put(Abort(sequence_id))

    def _send_order(self, order: AdapterOrder) -> None:
        assert self._engine_loop is not None
        self._engine_loop.inbox.put(order)

    def _run(self) -> None:
        """The thread: make the engine, run it, report its end."""
        try:
            engine = self._make_engine()
        except BaseException as error:  # noqa: BLE001 - whatever it is, `start` raises it
            self._cross(self._refuse_start, error)
            return
        self.limits = engine.limits
        self._engine = engine
        self._engine_loop = EngineLoop(engine, self._emit, self._turns, settle=self._note_settled)
        failure = EngineError("the engine was closed")
        if self._is_closing.is_set():  # `close` came while the model was loading, and did not wait
            self._cross(self._refuse_start, failure)
            self._cross(self._end, failure)
            return
        self._cross(self._deliver, [], engine.stats)
        self._cross(self._accept_start)
        try:
            self._engine_loop.run()
        except Exception:  # the top of the engine's thread: its requests must hear of it
            logger.exception("the engine died")
            failure = EngineError("the engine died; its log has the cause")
        self._cross(self._end, failure)

    def _accept_start(self) -> None:
        if not self._started.done():
            self._started.set_result(None)

    def _refuse_start(self, error: BaseException) -> None:
        if not self._started.done():
            self._started.set_exception(error)

    def _end(self, failure: EngineError) -> None:
        self._fail(failure)
        self._engine = self._engine_loop = None  # they hold the weights
        self._has_ended.set()

    def _emit(self, events: list[SequenceEvent], stats: EngineStats) -> None:
        self._cross(self._deliver, events, stats)

    def _note_settled(self, number: int, failure: FastChatError | None) -> None:
        self._cross(self._settle, number, failure)

    def _cross(self, callback: Callable[..., object], *arguments: object) -> None:
        """The one crossing from the engine's thread to the event loop."""
        try:
            self._event_loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:  # the loop was closed under us: nobody is left to hear it
            logger.debug("the event loop is closed; an engine event is lost")
