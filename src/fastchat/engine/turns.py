"""Turns of the engines that share one device: one step each, in the order in which they asked.

Two engines that compute at once on the same cores do not share them, they fight: each has threads for all of them. So
an engine on a thread takes its turn for every step, and another's long prompt holds it up for no more than one step.
While others have work too, a step computes only its part of a prompt.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class Turns:
    """One for all engines of a device; used by their threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: deque[threading.Event] = deque()
        self._is_taken = False
        self._busy: set[object] = set()

    def __repr__(self) -> str:
        return f"<Turns taken={self._is_taken} waiting={len(self._waiting)} busy={len(self._busy)}>"

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the device, and give it to who has waited longest afterwards."""
        self._take()
        try:
            yield
        finally:
            self._pass_on()

    def note_work(self, engine: object, *, has_work: bool) -> None:
        """Say whether an engine has more to compute; its turns cost the others tokens only while it has."""
        with self._lock:
            if has_work:
                self._busy.add(engine)
            else:
                self._busy.discard(engine)

    @property
    def num_busy(self) -> int:
        """Engines that have work."""
        return len(self._busy)

    def _take(self) -> None:
        with self._lock:
            if not self._is_taken:
                self._is_taken = True
                return
            own = threading.Event()
            self._waiting.append(own)
        own.wait()

    def _pass_on(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._is_taken = False
