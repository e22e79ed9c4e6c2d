"""Who runs next: the policy of the waiting queue. Torch-free, no I/O."""

from __future__ import annotations

import heapq
from typing import Protocol

from fastchat.engine.sequence import Sequence


class WaitingQueue(Protocol):
    """An order over waiting sequences. The scheduler admits from the front only."""

    def push(self, sequence: Sequence) -> None:
        """Add a new or a preempted sequence."""

    def peek(self) -> Sequence | None:
        """The sequence that should run next."""

    def pop(self) -> Sequence:
        """Take that sequence out."""

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that was aborted while it waited."""

    def __len__(self) -> int: ...


class PriorityQueue:
    """Lower priority number first, then first come, first served; a preempted sequence keeps its place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, sequence: Sequence) -> None:
        """Add a new or a preempted sequence."""
        heapq.heappush(self._heap, (sequence.request.priority, sequence.arrival, sequence))

    def peek(self) -> Sequence | None:
        """The sequence that should run next."""
        return self._heap[0][2] if self._heap else None

    def pop(self) -> Sequence:
        """Take that sequence out."""
        return heapq.heappop(self._heap)[2]

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that was aborted while it waited; linear in the queue's length."""
        self._heap = [entry for entry in self._heap if entry[2] is not sequence]
        heapq.heapify(self._heap)
