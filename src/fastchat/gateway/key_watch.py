"""Keeps an API server's keys what `fastchat keys` says they are, within a second and off the path of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import structlog

from fastchat.errors import ConfigError
from fastchat.ops.key_store import KeyStore, is_store
from fastchat.ops.keys import ApiKeys

LOOK_INTERVAL_S = 0.25

_log = structlog.stdlib.get_logger(__name__)


class KeyWatch:
    """Watches the store at `path`, which need not be there yet. Where it cannot be read, the last known keys stay."""

    def __init__(self, keys: ApiKeys, path: Path) -> None:
        self._keys = keys
        self._path = path
        self._store: KeyStore | None = None
        self._seen: tuple[int, int] | None = None
        self._noted: dict[str, str] = {}
        self._has_failed = False

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[None]:
        """While the block runs, the keys are kept fresh. Raises `ConfigError` for a store that cannot be read."""
        await asyncio.to_thread(self._look)
        task = asyncio.get_running_loop().create_task(self._look_forever())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            with suppress(ConfigError):
                await asyncio.to_thread(self._note_used)
            if self._store is not None:
                self._store.close()

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            look = asyncio.ensure_future(asyncio.to_thread(self._look_and_note))
            try:
                await asyncio.shield(look)
                self._has_failed = False
            except asyncio.CancelledError:
                await asyncio.wait({look})  # before its store is closed
                raise
            except Exception as error:  # noqa: BLE001 - the loop must live on, without it no key is ever revoked
                if not self._has_failed:
                    _log.error("API keys cannot be read, the last known ones stay", reason=str(error))
                self._has_failed = True
                self._close()

    def _look_and_note(self) -> None:
        self._look()
        self._note_used()

    def _look(self) -> None:
        if self._store is None:
            if not is_store(self._path):
                return
            self._store = KeyStore(self._path)
            self._seen = None
        version = self._store.version()
        if version == self._seen:
            return
        if self._seen is not None and version[1] != self._seen[1]:  # another file lies there now
            self._close()
            self._look()
            return
        keys = self._store.all_keys()
        self._keys.replace_stored(keys)
        self._seen = version
        _log.info("API keys read", num_valid=sum(key.revoked_at is None for key in keys), num_known=len(keys))

    def _note_used(self) -> None:
        """Write down which keys were used today, each once a day."""
        if self._store is None:
            return
        day = datetime.now(UTC).date().isoformat()
        fresh = [key_id for key_id in self._keys.take_used_ids() if self._noted.get(key_id) != day]
        if fresh:
            self._store.note_used(fresh, day=day)
            self._noted.update(dict.fromkeys(fresh, day))

    def _close(self) -> None:
        if self._store is not None:
            self._store.close()
            self._store = None
