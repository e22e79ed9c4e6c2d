"""The API keys that `fastchat keys` made: who holds them and until when, in a small SQLite file.

A key itself is shown once and never kept: the file has its SHA-256, which is enough because a key is 256 random bits.
Writers are short commands; API servers read, and ask `version` whether anything has changed.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sqlite3
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fastchat.errors import ConfigError

STORE_FILE_NAME = "api-keys.sqlite3"
KEY_PREFIX = "sk-fc-"
_BUSY_LIMIT_S = 5.0
_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL UNIQUE,
    created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, last_used_on TEXT,
    is_operator INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""


_ADD_OPERATORS = "ALTER TABLE keys ADD COLUMN is_operator INTEGER NOT NULL DEFAULT 0"
"""For a store of the time before operators."""


@dataclass(frozen=True, slots=True)
class StoredKey:
    """What is known of one key. Times are in seconds since 1970, the day is a date in UTC.

    `is_operator`: it may also load, unload and pin models.
    """

    key_id: str
    name: str
    digest: bytes
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_on: str | None
    is_operator: bool = False

    def is_valid(self, now: float) -> bool:
        """Whether it opens anything at `now`."""
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


class KeyStore:
    """One open store, made where it is missing. Its methods do short file I/O, one at a time.

    Raises `ConfigError` for a file that cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._told():
            _make_private(path)
            # Several threads, but never two at once.
            self._database = sqlite3.connect(path, timeout=_BUSY_LIMIT_S, check_same_thread=False, isolation_level=None)
            try:
                self._database.execute("PRAGMA journal_mode=WAL")
                self._database.execute(_SCHEMA)
                self._add_operators()
            except sqlite3.Error:
                self._database.close()
                raise

    def __repr__(self) -> str:
        return f"<KeyStore {self._path}>"

    def create(
        self, *, name: str, created_at: int, expires_at: int | None, is_operator: bool = False
    ) -> tuple[StoredKey, str]:
        """A new key: what is kept of it, and the key itself, which is nowhere else."""
        key = new_key()
        stored = StoredKey(
            key_id=f"key-{secrets.token_hex(6)}",
            name=name,
            digest=key_digest(key),
            created_at=created_at,
            expires_at=expires_at,
            revoked_at=None,
            last_used_on=None,
            is_operator=is_operator,
        )
        row = (stored.key_id, name, stored.digest, created_at, expires_at, is_operator)
        with self._told():
            self._database.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, NULL, NULL, ?)", row)
        return stored, key

    def all_keys(self) -> tuple[StoredKey, ...]:
        """All of them, the revoked too, oldest first."""
        with self._told():
            rows = self._database.execute("SELECT * FROM keys ORDER BY created_at, key_id").fetchall()
        return tuple(replace(StoredKey(*row), is_operator=bool(row[-1])) for row in rows)

    def revoke(self, key_id: str, *, now: int) -> bool:
        """Revoke it, for ever; False where there is no such key."""
        with self._told():
            self._database.execute(
                "UPDATE keys SET revoked_at = ? WHERE key_id = ? AND revoked_at IS NULL", (now, key_id)
            )
            found = self._database.execute("SELECT 1 FROM keys WHERE key_id = ?", (key_id,)).fetchone()
        return found is not None

    def note_used(self, key_ids: Collection[str], *, day: str) -> None:
        """Keep that these keys were used on `day`."""
        with self._told(), self._database:  # one transaction
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(
                "UPDATE keys SET last_used_on = ? WHERE key_id = ?", [(day, key_id) for key_id in key_ids]
            )

    def version(self) -> tuple[int, int]:
        """Another value after every change that somebody else made; cheap. Raises `ConfigError` once the file is gone.

        The file's number tells one that was put in its place.
        """
        with self._told():
            (version,) = self._database.execute("PRAGMA data_version").fetchone()
            return int(version), self._path.stat().st_ino

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _add_operators(self) -> None:
        columns = {row[1] for row in self._database.execute("PRAGMA table_info(keys)")}
        if "is_operator" not in columns:
            try:
                self._database.execute(_ADD_OPERATORS)
            except sqlite3.OperationalError as error:
                if "duplicate column" not in str(error):  # another process was quicker
                    raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(f"cannot use the API keys in {self._path}: {error}.") from error


def is_store(path: Path) -> bool:
    """Whether there is a file at `path`. Raises `ConfigError` where that cannot be told, which is no answer."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"cannot use the API keys in {path}: {error}.") from error
    return True


def has_keys(path: Path) -> bool:
    """Whether the store at `path` is there and has ever held a key."""
    if not is_store(path):
        return False
    store = KeyStore(path)
    try:
        return bool(store.all_keys())
    finally:
        store.close()


def new_key() -> str:
    """A key of 256 random bits. Its prefix and the CRC-32 at its end let a scanner for leaked secrets know it."""
    body = KEY_PREFIX + secrets.token_urlsafe(32)
    return f"{body}{zlib.crc32(body.encode()):08x}"


def key_digest(key: str) -> bytes:
    """What is kept and compared instead of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _make_private(path: Path) -> None:
    """Make the file readable by its owner alone before SQLite opens it; SQLite gives its side files the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
