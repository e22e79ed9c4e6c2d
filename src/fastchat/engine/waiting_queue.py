"""Who runs next: the policy of the waiting queue. Torch-free, no I/O."""

from __future__ import annotations

import heapq
from typing import Protocol

from fastchat.engine.sequence import Sequence

_MIN_HEAP = 64
"""A heap that is not larger than this is never cleaned up."""


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

    @property
    def num_tokens(self) -> int:
        """Tokens that all waiting sequences have yet to compute."""

    def __len__(self) -> int: ...


class PriorityQueue:
    """Lower priority number first, then first come, first served; a preempted sequence keeps its place.

    What is removed from the middle leaves its entry in the heap, to be dropped when it comes to the front or when most
    entries are such: a thousand clients that leave at once cost no more than a thousand that are served.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int]] = []  # (priority, arrival); arrivals are never the same
        self._waiting: dict[int, Sequence] = {}  # by arrival
        self._num_tokens = 0

    def __repr__(self) -> str:
        return f"<PriorityQueue {len(self._waiting)} waiting, {self._num_tokens} tokens>"

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def num_tokens(self) -> int:
        """Tokens that all waiting sequences have yet to compute."""
        return self._num_tokens

    def push(self, sequence: Sequence) -> None:
        """Add a new or a preempted sequence."""
        self._waiting[sequence.arrival] = sequence
        self._num_tokens += sequence.num_uncomputed_tokens
        heapq.heappush(self._heap, (sequence.request.priority, sequence.arrival))

    def peek(self) -> Sequence | None:
        """The sequence that should run next."""
        while self._heap and self._heap[0][1] not in self._waiting:
            heapq.heappop(self._heap)
        return self._waiting[self._heap[0][1]] if self._heap else None

    def pop(self) -> Sequence:
        """Take that sequence out."""
        sequence = self.peek()
        assert sequence is not None, "the queue is empty"
        heapq.heappop(self._heap)
        self._forget(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that was aborted while it waited."""
        self._forget(sequence)
        if len(self._heap) > 2 * len(self._waiting) + _MIN_HEAP:
            self._heap = [entry for entry in self._heap if entry[1] in self._waiting]
            heapq.heapify(self._heap)

    def _forget(self, sequence: Sequence) -> None:
        del self._waiting[sequence.arrival]
        self._num_tokens -= sequence.num_uncomputed_tokens
