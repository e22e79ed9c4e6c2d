"""The API server's view of the table: the controller's stream, kept open, and its last word while it is away."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import aiohttp
import structlog
from pydantic import ValidationError

from fastchat.cluster.attempts import CONNECT_LIMIT_S, Attempts
from fastchat.cluster.contract import WATCH_PATH, TableSnapshot, WorkerEntry
from fastchat.config import dial_url

SILENCE_LIMIT_S = 6.0
"""The controller says something at least every 5 s; longer silence is a dead connection."""
CARRY_OVER_S = 3.0
"""How long the workers of a controller that restarted are kept while they register again."""
MAX_LINE_BYTES = 16 * 2**20

_log = structlog.stdlib.get_logger(__name__)
_EMPTY = TableSnapshot(epoch="", version=0, workers=())


class TableWatcher:
    """Watches one controller. Owned by one event loop. `clock` is monotonic."""

    def __init__(self, *, controller_address: str, token: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._url = dial_url(controller_address) + WATCH_PATH
        self._headers = {"Authorization": f"Bearer {token}"}
        self._attempts = Attempts(controller_address)
        self._changed = asyncio.Event()
        self._carried: tuple[WorkerEntry, ...] = ()
        self._carried_until = 0.0
        self.snapshot = _EMPTY
        """The newest table known; empty before the first contact."""
        self.is_connected = False
        """Whether the table is fresh."""

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "waiting"
        return f"<TableWatcher {state} num_workers={len(self.snapshot.workers)}>"

    @property
    def has_snapshot(self) -> bool:
        """Whether the controller was ever reached."""
        return bool(self.snapshot.epoch)

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[None]:
        """While the block runs, the table is followed whenever the controller is there."""
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S, sock_read=SILENCE_LIMIT_S)
        async with aiohttp.ClientSession(
            timeout=timeout, trust_env=False, raise_for_status=True, read_bufsize=MAX_LINE_BYTES
        ) as session:
            task = asyncio.get_running_loop().create_task(self._run(session))
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def wait_for_change(self, known: TableSnapshot) -> TableSnapshot:
        """The first snapshot that is not `known`; waits for it."""
        while self.snapshot is known:
            await self._changed.wait()
        return self.snapshot

    async def _run(self, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                await self._follow(session)
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._attempts.note_failure(error)
            except Exception:  # noqa: BLE001 - the loop must live on, without it no new worker is ever learned of
                _log.exception("watching the controller failed")
            await self._attempts.wait()

    async def _follow(self, session: aiohttp.ClientSession) -> None:
        """One connection, from the first line to its end."""
        async with session.get(self._url, headers=self._headers, allow_redirects=False) as response:
            try:
                while line := await response.content.readline():
                    self._take(line)
                    if not self.is_connected:
                        self.is_connected = True
                        self._attempts.note_success("watching the controller", num_workers=len(self.snapshot.workers))
            finally:
                self.is_connected = False
        raise ConnectionResetError("the connection was closed")

    def _take(self, line: bytes) -> None:
        try:
            fresh = TableSnapshot.model_validate_json(line)
        except ValidationError as error:
            raise ConnectionResetError("the controller sent what is no table") from error
        now = self._clock()
        if fresh.epoch != self.snapshot.epoch:
            self._carried, self._carried_until = self.snapshot.workers, now + CARRY_OVER_S
        elif now > self._carried_until:
            self._carried = ()
        registered = {worker.worker_id for worker in fresh.workers}
        self._carried = tuple(worker for worker in self._carried if worker.worker_id not in registered)
        merged = fresh.model_copy(update={"workers": fresh.workers + self._carried}) if self._carried else fresh
        if merged != self.snapshot:
            self.snapshot = merged
            announced, self._changed = self._changed, asyncio.Event()
            announced.set()
