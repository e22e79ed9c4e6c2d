"""Laws of API keys."""

from __future__ import annotations

import hashlib

import pytest

from fastchat.errors import ConfigError
from fastchat.ops.key_store import StoredKey
from fastchat.ops.keys import ApiKeys

KEYS = ApiKeys(["sk-one", "sk-two"], tenant_secret="cluster")


def test_every_key_is_allowed_and_nothing_else():
    """Not a prefix, not a digest, not an injection, not odd or endless text."""
    assert KEYS.is_allowed("sk-one")
    assert KEYS.is_allowed("sk-two")
    digest = hashlib.sha256(b"sk-one").hexdigest()
    for wrong in ("", "sk-", "sk-one ", "SK-ONE", digest, "' OR 1=1--", "ключ", "\udce9", "x" * 65536):
        assert not KEYS.is_allowed(wrong)


def test_without_keys_everybody_is_let_in_as_one_tenant():
    """FastChat's default."""
    keys = ApiKeys([])
    assert keys.is_open
    assert keys.is_allowed("EMPTY")
    assert keys.tenant_of("EMPTY") == ""


def test_the_page_s_key_opens_a_closed_door_and_closes_none():
    """With keys by flag, with stored ones, and with none; it is a tenant of its own."""
    alone = ApiKeys([], page_key="page-key")
    assert alone.is_open
    assert alone.is_allowed("EMPTY")
    alone.replace_stored([StoredKey("key-1", "name", b"digest", 0, None, 5, None)])
    beside = ApiKeys(["sk-one"], page_key="page-key")
    for keys in (alone, beside):
        assert not keys.is_open
        assert not keys.is_allowed("EMPTY")
        assert keys.is_allowed("page-key")
        assert keys.tenant_of("page-key") not in ("", keys.tenant_of("sk-one"))


def test_tenant_is_opaque_stable_and_the_keys_own():
    """The same in every process of a cluster, different for each key and cluster, and never the key or its digest."""
    tenant = KEYS.tenant_of("sk-one")
    assert tenant == ApiKeys(["sk-one"], tenant_secret="cluster").tenant_of("sk-one")
    assert tenant != KEYS.tenant_of("sk-two")
    assert tenant != ApiKeys(["sk-one"], tenant_secret="other").tenant_of("sk-one")
    assert tenant not in hashlib.sha256(b"sk-one").hexdigest()
    assert not KEYS.is_allowed(tenant)


def test_keys_are_not_shown():
    """Objects are printed in logs and tracebacks."""
    assert repr(KEYS) == "<ApiKeys num_keys=2>"


def test_empty_key_is_a_configuration_error():
    """`--api-keys a,,b` would let an empty bearer in."""
    with pytest.raises(ConfigError):
        ApiKeys(["a", ""])
