"""Final records on their way from a control connection into the ledger, off the path of the worker's life signs.

A ledger that is slow, locked or on a full disk costs no worker its place: nobody who still listens is called silent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import structlog

from fastchat.cluster.contract import FinalRecord
from fastchat.cluster.registration import MAX_RECORDS
from fastchat.cluster.usage import UsageLedger
from fastchat.errors import UnavailableError

RETRY_S = 1.0

_log = structlog.stdlib.get_logger(__name__)


class RecordInbox:
    """The records of one connection that are not kept yet; `acknowledge` is awaited with the number of the last kept.

    `turn` is one lock for all inboxes of a ledger: those who wait for a slow one hold no thread meanwhile.
    """

    def __init__(
        self, ledger: UsageLedger, turn: asyncio.Lock, worker_id: str, acknowledge: Callable[[int], Awaitable[None]]
    ) -> None:
        self._ledger = ledger
        self._turn = turn
        self._worker_id = worker_id
        self._acknowledge = acknowledge
        # The worker holds no more of them either: what falls out here it has dropped as well.
        self._records: deque[FinalRecord] = deque(maxlen=MAX_RECORDS)
        self._has_news = asyncio.Event()
        self._is_closed = False
        self._has_failed = False

    def __repr__(self) -> str:
        return f"<RecordInbox worker_id={self._worker_id} num_records={len(self._records)}>"

    def put(self, record: FinalRecord) -> None:
        """Take a record. Never blocks."""
        self._records.append(record)
        self._has_news.set()

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[None]:
        """While the block runs, what is put is kept soon; at its end what is left is tried once more."""
        task = asyncio.get_running_loop().create_task(self._keep_all())
        try:
            yield
        finally:
            self._is_closed = True
            self._has_news.set()
            await task

    async def _keep_all(self) -> None:
        while not self._is_closed or self._records:
            await self._has_news.wait()
            self._has_news.clear()
            while self._records:
                number = await self._keep(tuple(self._records))
                if number is not None:
                    while self._records and self._records[0].number <= number:
                        self._records.popleft()
                    await self._acknowledge(number)
                elif self._is_closed:
                    return
                else:
                    await asyncio.sleep(RETRY_S)

    async def _keep(self, records: tuple[FinalRecord, ...]) -> int | None:
        """The number of the last that is kept now; None where the ledger cannot be written."""
        try:
            async with self._turn:
                number = await asyncio.to_thread(self._ledger.add, self._worker_id, records)
        except UnavailableError as error:
            if not self._has_failed:
                _log.error("usage records wait", worker_id=self._worker_id, reason=error.message)
            self._has_failed = True
            return None
        self._has_failed = False
        return number
