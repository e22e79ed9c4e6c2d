"""Finds the workers that live and are of no use, from the controller's table: they drain unasked, or stand still."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from typing import NoReturn

from fastchat.cluster.contract import TableSnapshot
from fastchat.cluster.watcher import TableWatcher

STUCK_AFTER_S = 15.0
"""How long a worker must be called hung without a break: a machine that was busy or asleep has recovered by then."""


class WorkerWatch:
    """Calls `replace(name, reason=..., is_stuck=...)` once for a worker that should be started again.

    `names_by_address` are the workers to look after; the clock is monotonic.
    """

    def __init__(
        self,
        names_by_address: Mapping[str, str],
        replace: Callable[..., None],
        *,
        clock: Callable[[], float] = time.monotonic,
        stuck_after_s: float = STUCK_AFTER_S,
    ) -> None:
        self._names = names_by_address
        self._replace = replace
        self._clock = clock
        self._stuck_after_s = stuck_after_s
        self._hung_since: dict[str, float] = {}
        self._replaced: set[str] = set()

    async def follow(self, watcher: TableWatcher) -> NoReturn:
        """Look at every new table, and again when a worker has been hung for long enough."""
        known = watcher.snapshot
        while True:
            wait_s = self.look(known)
            with contextlib.suppress(TimeoutError):
                known = await asyncio.wait_for(watcher.wait_for_change(known), wait_s)

    def look(self, snapshot: TableSnapshot) -> float | None:
        """Judge one table; returns the seconds after which to judge it again even if it stays the same."""
        now = self._clock()
        own = {worker.worker_id: worker for worker in snapshot.workers if worker.address in self._names}
        self._replaced &= own.keys()
        hung_ids = [worker_id for worker_id, worker in own.items() if worker.state == "hung"]
        self._hung_since = {worker_id: self._hung_since.get(worker_id, now) for worker_id in hung_ids}
        for worker_id, worker in own.items():
            is_stuck = worker_id in self._hung_since and now - self._hung_since[worker_id] >= self._stuck_after_s
            # A worker that drains unasked has lost an engine, or somebody else ends its process.
            if (is_stuck or worker.state == "draining") and worker_id not in self._replaced:
                self._replaced.add(worker_id)
                reason = "it stands still" if is_stuck else "it takes no more requests"
                self._replace(self._names[worker.address], reason=reason, is_stuck=is_stuck)
        waiting = [since for worker_id, since in self._hung_since.items() if worker_id not in self._replaced]
        return max(0.0, min(waiting) + self._stuck_after_s - now) if waiting else None
