"""The loop around one engine: takes commands from an inbox, steps, gives out each step's events at once.

Runs on one thread, wherever the engine lives (`thread_client.py`, `process_server.py`).
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass

from fastchat.engine.engine import Engine
from fastchat.engine.events import EngineStats, SequenceEvent, SequenceRequest


@dataclass(frozen=True, slots=True)
class Abort:
    """End a sequence early."""

    sequence_id: str


@dataclass(frozen=True, slots=True)
class Stop:
    """Abort everything and leave the loop."""


Command = SequenceRequest | Abort | Stop


class EngineLoop:
    """Commands may be put into `inbox` from any thread; `emit` is called on the loop's thread."""

    def __init__(self, engine: Engine, emit: Callable[[list[SequenceEvent], EngineStats], None]) -> None:
        self.inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._engine = engine
        self._emit = emit
        self._has_stopped = False

    def run(self) -> None:
        """Step until `Stop`. Sleeps while there is nothing to compute."""
        while not self._has_stopped:
            events = self._take_commands()
            if not self._has_stopped and self._engine.has_work:
                events += self._engine.step()
            self._emit(events, self._engine.stats)

    def _take_commands(self) -> list[SequenceEvent]:
        """Obey all commands that wait; wait for one if there is no work."""
        events: list[SequenceEvent] = []
        command = self._next_command(wait=not self._engine.has_work)
        while command is not None and not self._has_stopped:
            match command:
                case SequenceRequest():
                    self._engine.add(command)
                case Abort(sequence_id):
                    event = self._engine.abort(sequence_id)
                    events += [] if event is None else [event]
                case Stop():
                    self._has_stopped = True
            command = self._next_command(wait=False)
        return events

    def _next_command(self, *, wait: bool) -> Command | None:
        try:
            return self.inbox.get(block=wait)
        except queue.Empty:
            return None
