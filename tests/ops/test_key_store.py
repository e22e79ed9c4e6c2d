"""Laws of the store of API keys."""

from __future__ import annotations

import hashlib
import sqlite3
import stat
from contextlib import closing

import pytest

from fastchat.errors import ConfigError
from fastchat.ops.key_store import STORE_FILE_NAME, KeyStore, has_keys, key_digest, new_key
from fastchat.ops.keys import ApiKeys

NOW = 1_800_000_000


@pytest.fixture
def store(tmp_path):
    store = KeyStore(tmp_path / "state" / STORE_FILE_NAME)
    yield store
    store.close()


def make(store, name="", expires_at=None):
    return store.create(name=name, created_at=NOW, expires_at=expires_at)


def test_file_is_the_owner_s_alone_and_holds_no_key(store, tmp_path):
    """Mode 0600, the write-ahead log too; what is in them is a digest."""
    stored, key = make(store, "laptop")
    files = list((tmp_path / "state").iterdir())
    assert len(files) > 1
    for file in files:
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert key.encode() not in file.read_bytes()
        assert key[6:30].encode() not in file.read_bytes()
    assert stored.digest == hashlib.sha256(key.encode()).digest()


def test_operators_are_told_apart_and_an_older_store_has_none(tmp_path):
    """A key made for operators, one for clients, and a file of the time before operators."""
    path = tmp_path / STORE_FILE_NAME
    with closing(sqlite3.connect(path)) as database:
        database.execute(
            "CREATE TABLE keys (key_id TEXT PRIMARY KEY, name TEXT NOT NULL, digest BLOB NOT NULL UNIQUE, "
            "created_at INTEGER NOT NULL, expires_at INTEGER, revoked_at INTEGER, last_used_on TEXT) WITHOUT ROWID"
        )
        database.execute("INSERT INTO keys VALUES ('key-0', '', ?, 1, NULL, NULL, NULL)", (key_digest("old"),))
        database.commit()
    for _ in range(2):
        store = KeyStore(path)
        assert not any(key.is_operator for key in store.all_keys())
        store.close()
    store = KeyStore(path)
    _, operator = store.create(name="", created_at=NOW, expires_at=None, is_operator=True)
    _, client = make(store)
    keys = ApiKeys(("given",), clock=lambda: NOW)
    keys.replace_stored(store.all_keys())
    store.close()
    assert [keys.is_operator(key) for key in ("given", operator, client, "old", "other", "")] == [True, True] + [
        False
    ] * 4


def test_keys_differ_and_have_256_random_bits():
    """43 characters of 6 bits between the prefix and the checksum."""
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) == len("sk-fc-") + 43 + 8 and key.isascii() for key in keys)


def test_others_see_every_change_by_the_version_alone(store, tmp_path):
    """It stays the same while nothing happens and differs after a creation, a revocation and a first use."""
    reader = KeyStore(tmp_path / "state" / STORE_FILE_NAME)
    versions = [reader.version()]
    assert reader.version() == versions[0]
    stored, _ = make(store)
    versions.append(reader.version())
    assert store.revoke(stored.key_id, now=NOW)
    versions.append(reader.version())
    store.note_used([stored.key_id], day="2026-01-01")
    versions.append(reader.version())
    assert len(set(versions)) == 4
    reader.close()


def test_revoked_stays_revoked_and_is_still_listed(store):
    """The first moment counts; an unknown id is told."""
    stored, _ = make(store)
    assert store.revoke(stored.key_id, now=NOW + 1)
    assert store.revoke(stored.key_id, now=NOW + 2)
    assert [key.revoked_at for key in store.all_keys()] == [NOW + 1]
    assert not store.revoke("key-unknown", now=NOW)


def test_stored_key_opens_until_it_expires_or_is_revoked(store):
    """Its tenant is its id; a digest or a cut key opens nothing."""
    now = float(NOW)
    stored, key = make(store, expires_at=NOW + 10)
    keys = ApiKeys([], clock=lambda: now)
    assert keys.is_open
    keys.replace_stored(store.all_keys())
    assert not keys.is_open
    assert keys.is_allowed(key)
    assert keys.tenant_of(key) == stored.key_id
    for wrong in ("", key[:-1], key + "0", stored.digest.hex(), stored.key_id):
        assert not keys.is_allowed(wrong)
    now += 10
    assert not keys.is_allowed(key)
    now -= 1
    store.revoke(stored.key_id, now=NOW)
    keys.replace_stored(store.all_keys())
    assert not keys.is_allowed(key)
    assert not keys.is_open, "revoking the last key must not open the door"


def test_stored_and_given_keys_hold_side_by_side(store):
    """`--api-keys` still works; an empty store changes nothing."""
    keys = ApiKeys(["sk-given"])
    keys.replace_stored(store.all_keys())
    assert keys.is_allowed("sk-given")
    _, key = make(store)
    keys.replace_stored(store.all_keys())
    assert keys.is_allowed("sk-given")
    assert keys.is_allowed(key)


def test_used_ids_are_told_once(store):
    """Those of stored keys alone."""
    stored, key = make(store)
    keys = ApiKeys(["sk-given"])
    keys.replace_stored(store.all_keys())
    for bearer in (key, key, "sk-given", "wrong"):
        keys.is_allowed(bearer)
    assert keys.take_used_ids() == {stored.key_id}
    assert keys.take_used_ids() == frozenset()


def test_file_that_is_no_store_is_a_configuration_error(tmp_path):
    """With its name, so that the operator can look."""
    path = tmp_path / STORE_FILE_NAME
    path.write_text("not a database, " * 100)
    with pytest.raises(ConfigError, match=STORE_FILE_NAME):
        KeyStore(path)


def test_missing_store_has_no_keys_and_is_not_made(tmp_path):
    """Looking leaves no trace."""
    assert not has_keys(tmp_path / STORE_FILE_NAME)
    assert list(tmp_path.iterdir()) == []


def test_store_that_cannot_be_looked_for_is_not_taken_for_missing(tmp_path):
    """Without keys a server would be open."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=STORE_FILE_NAME):
        has_keys(tmp_path / "file" / STORE_FILE_NAME)


def test_digest_takes_any_text():
    """What a client sends may be no text at all."""
    assert key_digest("\udce9") != key_digest("é")
