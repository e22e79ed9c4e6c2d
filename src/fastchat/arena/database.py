"""One SQLite file, used by one thread, so that no statement ever holds up the event loop.

What waits for the thread is bounded. A file that is damaged, locked or gone is an `UnavailableError` for who asked and
a line in the log, and nothing else in the process notices.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog

from fastchat.errors import UnavailableError

T = TypeVar("T")

MAX_WAITING = 256
LOCK_LIMIT_S = 2.0
"""How long one statement waits for another process that holds the file."""

_log = structlog.stdlib.get_logger(__name__)


class Database:
    """A connection and its thread. `open` first, `close` at the end, also after an `open` that failed.

    Several may have one file open; only one of this process should write, and it alone makes the file and its tables.
    """

    def __init__(self, path: Path, schema: str, *, writes: bool) -> None:
        self._path = path
        self._schema = schema
        # A writer takes its lock first: one that has read already would be refused after another process wrote.
        self._begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
        self._writes = writes
        self._connection: sqlite3.Connection | None = None
        self._opened_file: tuple[int, int] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="arena database")
        self._num_waiting = 0

    def __repr__(self) -> str:
        return f"<Database {self._path.name} {'open' if self._connection else 'not open'} waiting={self._num_waiting}>"

    @property
    def is_open(self) -> bool:
        """Whether `open` succeeded."""
        return self._connection is not None

    async def open(self) -> None:
        """Open the file. A failure is logged, and met again by every `run`."""
        try:
            self._connection = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except (sqlite3.Error, OSError) as error:
            _log.error(
                "the arena cannot open its records and answers 503; move the file away and start again",
                path=str(self._path),
                cause=str(error),
            )

    async def close(self) -> None:
        """Finish what waits and close the file."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, connection.close)
        self._thread.shutdown(wait=False)

    async def run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The result of `work` in one transaction, done in the thread. Raises `UnavailableError`, or what it raises."""
        connection = self._connection
        if connection is None:
            raise _unavailable()
        if self._num_waiting >= MAX_WAITING:
            raise UnavailableError("The arena is busy; try again in a moment.", retry_after_s=2, code="arena_busy")
        self._num_waiting += 1
        loop = asyncio.get_running_loop()
        future = self._thread.submit(self._in_transaction, connection, work)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._note_done))
        try:
            return await asyncio.wrap_future(future)
        except sqlite3.Error as error:
            _log.error("the arena's records failed", path=str(self._path), cause=str(error))
            raise _unavailable() from error

    def _note_done(self) -> None:
        self._num_waiting -= 1

    def _in_transaction(self, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]) -> T:
        if _identity(self._path) != self._opened_file:  # SQLite would go on with it, and what it writes would be lost
            raise sqlite3.OperationalError("the file was moved or deleted; start the API server again for a new one")
        with connection:  # commits, or rolls back what an error left half done
            connection.execute(self._begin)
            return work(connection)

    def _open(self) -> sqlite3.Connection:
        if self._writes:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))  # for the owner alone, before SQLite opens it
        connection = sqlite3.connect(self._path, timeout=LOCK_LIMIT_S, check_same_thread=False, isolation_level=None)
        try:
            if self._writes:
                # WAL without a flush per commit: a killed process loses nothing, a power failure the last moments.
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")
                connection.executescript(self._schema)
            else:
                connection.execute("PRAGMA query_only=ON")
        except sqlite3.Error:
            connection.close()
            raise
        self._opened_file = _identity(self._path)
        return connection


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file lies there; None where none can be seen."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def _unavailable() -> UnavailableError:
    return UnavailableError(
        "The arena's records cannot be used now; chat is not affected, and the server's log has the cause.",
        retry_after_s=5,
        code="arena_unavailable",
    )
