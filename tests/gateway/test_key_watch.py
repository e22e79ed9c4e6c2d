"""The watch over the API keys lives on, whatever a look at the store meets."""

import asyncio
import sqlite3
import time
from contextlib import closing

from fastchat.gateway import key_watch
from fastchat.gateway.key_watch import KeyWatch
from fastchat.ops.key_store import STORE_FILE_NAME, KeyStore
from fastchat.ops.keys import ApiKeys


def test_key_is_revoked_after_a_look_that_failed_unexpectedly(tmp_path, monkeypatch):
    """A loop that ended with the fault would let the revoked key in for ever."""
    path = tmp_path / STORE_FILE_NAME
    store = KeyStore(path)
    stored, key = store.create(name="one", created_at=0, expires_at=None)
    keys = ApiKeys([])
    faults: list[str] = []
    look = KeyStore.version

    def version(store: KeyStore) -> tuple[int, int]:
        if faults:
            raise RuntimeError(faults.pop())
        return look(store)

    async def watch() -> None:
        async with KeyWatch(keys, path).keep_open(), asyncio.timeout(10):
            assert keys.is_allowed(key)
            assert not keys.is_allowed("another")
            faults.append("of no kind that anybody thought of")
            while faults:
                await asyncio.sleep(0.01)
            store.revoke(stored.key_id, now=int(time.time()))
            while keys.is_allowed(key):
                await asyncio.sleep(0.01)

    monkeypatch.setattr(KeyStore, "version", version)
    monkeypatch.setattr(key_watch, "LOOK_INTERVAL_S", 0.01)
    asyncio.run(watch())
    store.close()


def test_what_a_look_notes_is_there_although_the_watch_ends_meanwhile(tmp_path, monkeypatch):
    """Its store is not closed under it."""
    path = tmp_path / STORE_FILE_NAME
    with closing(KeyStore(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        _, key = store.create(name="one", created_at=0, expires_at=None)
        keys = ApiKeys([])

        async def watch() -> None:
            async with KeyWatch(keys, path).keep_open(), asyncio.timeout(10):
                other.execute("BEGIN IMMEDIATE")
                assert keys.is_allowed(key)
                while keys._used_ids:  # a look has them, and waits for the file
                    await asyncio.sleep(0.001)
                asyncio.get_running_loop().call_later(0.2, other.rollback)

        monkeypatch.setattr(key_watch, "LOOK_INTERVAL_S", 0.01)
        asyncio.run(watch())
        assert store.all_keys()[0].last_used_on is not None
