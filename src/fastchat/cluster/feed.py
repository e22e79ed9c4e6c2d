"""The table as a stream of snapshots: what the controller sends to each watcher, and what one process shares inside."""

from __future__ import annotations

import asyncio

from fastchat.cluster.contract import TableSnapshot
from fastchat.cluster.table import WorkerTable

HEARTBEAT_S = 2.5
"""A snapshot at least this often, so that a dead connection is noticed (the contract says 5 s)."""
MIN_LOAD_INTERVAL_S = 0.25
"""Changes of load alone are gathered for this long."""


class TableFeed:
    """One reader of a table. Used as a context: outside of it the table does not know the feed."""

    def __init__(self, table: WorkerTable) -> None:
        self._table = table
        self._has_change = asyncio.Event()
        self._is_urgent = asyncio.Event()
        self._sent_at: float | None = None
        self._is_closed = False

    def __enter__(self) -> TableFeed:
        self._table.add_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._table.remove_listener(self._note)

    async def next_snapshot(self) -> TableSnapshot | None:
        """The table: at once the first time, then after each change or heartbeat. None once the feed is closed."""
        if self._sent_at is not None:
            await self._wait(self._has_change, HEARTBEAT_S)
            if self._has_change.is_set():
                await self._wait(self._is_urgent, self._sent_at + MIN_LOAD_INTERVAL_S - _now())
        if self._is_closed:
            return None
        snapshot = self._table.snapshot()  # before the events are cleared: looking may itself find a change
        self._has_change.clear()
        self._is_urgent.clear()
        self._sent_at = _now()
        return snapshot

    def close(self) -> None:
        """End the feed: whoever waits for a snapshot gets None."""
        self._is_closed = True
        self._note(is_urgent=True)

    def _note(self, is_urgent: bool) -> None:
        self._has_change.set()
        if is_urgent:
            self._is_urgent.set()

    @staticmethod
    async def _wait(event: asyncio.Event, limit_s: float) -> None:
        try:
            async with asyncio.timeout(max(0.0, limit_s)):
                await event.wait()
        except TimeoutError:
            pass


def _now() -> float:
    return asyncio.get_running_loop().time()
