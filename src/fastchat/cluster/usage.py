"""What the requests of a cluster cost: final records, each counted once, totals per model and tenant.

Kept in a small SQLite file, so that an acknowledged record survives a restart of the controller. The methods do short
file I/O: asynchronous code calls them in a thread; a lock makes that safe.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastchat.cluster.contract import FinalRecord
from fastchat.errors import ConfigError, UnavailableError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS workers (worker_id TEXT PRIMARY KEY, last_number INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS totals (
    model TEXT NOT NULL, tenant TEXT NOT NULL,
    num_requests INTEGER NOT NULL, num_prompt_tokens INTEGER NOT NULL,
    num_cached_tokens INTEGER NOT NULL, num_generated_tokens INTEGER NOT NULL,
    num_aborted INTEGER NOT NULL, num_failed INTEGER NOT NULL,
    PRIMARY KEY (model, tenant)
) WITHOUT ROWID;
"""
_ADD = """
INSERT INTO totals VALUES (?, ?, 1, ?, ?, ?, ?, ?)
ON CONFLICT (model, tenant) DO UPDATE SET
    num_requests = num_requests + 1,
    num_prompt_tokens = num_prompt_tokens + excluded.num_prompt_tokens,
    num_cached_tokens = num_cached_tokens + excluded.num_cached_tokens,
    num_generated_tokens = num_generated_tokens + excluded.num_generated_tokens,
    num_aborted = num_aborted + excluded.num_aborted,
    num_failed = num_failed + excluded.num_failed
"""


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """What one tenant's requests to one model cost. `num_aborted` and `num_failed` are part of `num_requests`."""

    model: str
    tenant: str
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generated_tokens: int
    num_aborted: int
    num_failed: int


class UsageLedger:
    """Counts final records. `path` None keeps them in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._lock = threading.Lock()
        self.num_added = 0
        """Records counted since this object was made."""
        try:
            self._database = _open(path)
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"cannot keep the usage records in {path}: {error}; move the file away.") from error

    def add(self, worker_id: str, records: Sequence[FinalRecord]) -> int:
        """Count the records that are new; returns the highest number now kept of that worker.

        Numbers of a worker id arrive in growing order; one that is not above the highest kept is ignored. Raises
        `UnavailableError` where the file cannot be written; nothing of `records` is counted then.
        """
        with self._lock:
            try:
                with self._database:  # commits, or rolls back what an error left half done
                    self._database.execute("BEGIN IMMEDIATE")
                    last_number, num_new = self._add_new(worker_id, records)
            except sqlite3.Error as error:
                raise UnavailableError(f"usage records cannot be written: {error}") from error
            self.num_added += num_new
        return last_number

    def totals(self) -> tuple[UsageTotal, ...]:
        """All totals, sorted by model and tenant."""
        with self._lock:
            rows = self._database.execute("SELECT * FROM totals ORDER BY model, tenant").fetchall()
        return tuple(UsageTotal(*row) for row in rows)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._database.close()

    def _add_new(self, worker_id: str, records: Sequence[FinalRecord]) -> tuple[int, int]:
        row = self._database.execute("SELECT last_number FROM workers WHERE worker_id = ?", (worker_id,)).fetchone()
        last_number = int(row[0]) if row else 0
        num_new = 0
        for record in records:
            if record.number > last_number:
                self._database.execute(_ADD, _row(record))
                last_number = record.number
                num_new += 1
        if num_new:
            self._database.execute("INSERT OR REPLACE INTO workers VALUES (?, ?)", (worker_id, last_number))
        return last_number, num_new


def _row(record: FinalRecord) -> tuple[str | int, ...]:
    return (
        record.model,
        record.tenant,
        record.num_prompt_tokens,
        record.num_cached_tokens,
        record.num_generated_tokens,
        int(record.reason == "abort"),
        int(record.reason == "error"),
    )


def _open(path: Path | None) -> sqlite3.Connection:
    database = sqlite3.connect(
        _private_file(path) if path else ":memory:", check_same_thread=False, isolation_level=None
    )
    try:
        # WAL without a flush per commit: a killed process loses nothing, a power failure the last moments.
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=NORMAL")
        database.executescript(_SCHEMA)
    except sqlite3.Error:
        database.close()
        raise
    return database


def _private_file(path: Path) -> Path:
    """Make the file readable by its owner alone before SQLite opens it."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    return path
