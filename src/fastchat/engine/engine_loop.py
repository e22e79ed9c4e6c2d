"""The loop around one engine: takes commands from an inbox, steps, gives out each step's events at once.

Runs on one thread, wherever the engine lives (`thread_client.py`, `process_server.py`).
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from dataclasses import dataclass

from fastchat.engine.adapters import AdapterOrder
from fastchat.engine.engine import Engine
from fastchat.engine.events import EngineStats, SequenceEvent, SequenceRequest
from fastchat.engine.turns import Turns
from fastchat.errors import EngineError, FastChatError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Abort:
    """End a sequence early."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Abort everything and leave the loop."""


Command = SequenceRequest | Abort | AdapterOrder | Stop


class EngineLoop:
    """Commands may be put into `inbox` from any thread; `emit` and `settle` are called on the loop's thread.

    `settle` is told the number of an order that was carried out, or why it was not. Engines of one process that share a
    device share `turns`.
    """

    def __init__(
        self,
        engine: Engine,
        emit: Callable[[list[SequenceEvent], EngineStats], None],
        turns: Turns | None = None,
        *,
        settle: Callable[[int, FastChatError | None], None] = lambda _number, _failure: None,
    ) -> None:
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._engine = engine
        self._emit = emit
        self._settle = settle
        self._turns = turns or Turns()
        self._has_stopped = False
        self.awaits_turn = False
        """Whether it could compute and another engine has the device; may be read from any thread."""

    def run(self) -> None:
        """Step until `Stop`. Sleeps while there is nothing to compute."""
        try:
            while not self._has_stopped:
                events = self._take_commands()
                if not self._has_stopped:
                    events += self._step()
                self._emit(events, self._engine.stats)
        finally:
            self._turns.note_work(self, has_work=False)

    def _step(self) -> list[SequenceEvent]:
        """A step in turn, if there is anything to compute."""
        self._turns.note_work(self, has_work=self._engine.has_work)
        if not self._engine.has_work:
            return []
        self.awaits_turn = True
        with self._turns.turn():
            self.awaits_turn = False
            events = self._engine.step(num_sharing=self._turns.num_busy)
        self._turns.note_work(self, has_work=self._engine.has_work)
        return events

    def _take_commands(self) -> list[SequenceEvent]:
        """Obey all commands that wait; wait for one if there is no work."""
        events: list[SequenceEvent] = []
        command = self._next_command(wait=not self._engine.has_work)
        while command is not None and not self._has_stopped:
            match command:
                case SequenceRequest():
                    event = self._engine.add(command)
                    events += [] if event is None else [event]
                case Abort(sequence_id):
                    event = self._engine.abort(sequence_id)
                    events += [] if event is None else [event]
                case AdapterOrder(number):
                    self._settle(number, self._obey(command))
                case Stop():
                    self._has_stopped = True
            command = self._next_command(wait=False)
        return events

    def _obey(self, order: AdapterOrder) -> FastChatError | None:
        """Why an order could not be obeyed; whatever an adapter's files hold, the engine lives on."""
        try:
            if order.source:
                self._engine.adapters.add(order.name, order.source)
            else:
                self._engine.adapters.remove(order.name)
        except FastChatError as error:
            error.__cause__ = error.__context__ = None  # they hold what was read, and so does the traceback
            return error.with_traceback(None)
        except Exception:
            logger.exception("an adapter could not be loaded folder=%s", order.source)
            return EngineError(f"{order.source} could not be loaded; the log has the cause")
        return None

    def _next_command(self, *, wait: bool) -> Command | None:
        try:
            return self.inbox.get(block=wait)
        except queue.Empty:
            return None
