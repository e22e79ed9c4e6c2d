"""API keys: held as digests, compared in constant time, turned into opaque tenant ids.

Those of `--api-keys` are known from the start. Those of `fastchat keys` come and go while the process runs.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Sequence

from fastchat.errors import ConfigError
from fastchat.ops.key_store import StoredKey, key_digest

_TENANT_CHARACTERS = 32


class ApiKeys:
    """The keys that a process accepts; where there has never been one, everybody is let in.

    `tenant_secret` (the cluster token) makes tenant ids the same in every API server of a cluster, and useless to
    anyone who would guess the key from the id. `clock` is the calendar's, which expiry is about. `page_key` is accepted
    too, and is none of the keys that close an open door.
    """

    def __init__(
        self,
        keys: Sequence[str],
        *,
        page_key: str | None = None,
        tenant_secret: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        if any(not key.strip() for key in keys):
            raise ConfigError("an API key is empty; check the commas in --api-keys.")
        self._clock = clock
        secret = hashlib.sha256(tenant_secret.encode()).digest()
        self._tenants = {
            digest: hmac.new(secret, digest, hashlib.sha256).hexdigest()[:_TENANT_CHARACTERS]
            for digest in map(key_digest, [*keys, page_key] if page_key else keys)
        }
        self._stored: dict[bytes, StoredKey] = {}
        self._used_ids: set[str] = set()
        self._is_closed_by_flag = bool(keys)
        self.is_open = not keys
        """Whether no key is needed."""

    def __repr__(self) -> str:
        return f"<ApiKeys num_keys={len(self._tenants) + len(self._stored)}>"

    def replace_stored(self, keys: Sequence[StoredKey]) -> None:
        """Take over the store's present keys. A store that holds none but revoked ones lets nobody in."""
        self._stored = {key.digest: key for key in keys if key.revoked_at is None}
        self.is_open = not self._is_closed_by_flag and not keys

    def is_allowed(self, bearer: str) -> bool:
        """Whether `bearer` is one of the keys."""
        return self.is_open or self._tenant(bearer) is not None

    def tenant_of(self, bearer: str) -> str:
        """An opaque id of who holds `bearer`: the key's id, where it has one; "" where no key is needed."""
        return "" if self.is_open else self._tenant(bearer) or ""

    def is_operator(self, bearer: str) -> bool:
        """Whether `bearer` may move models: a key that the process was started with, or one made for operators."""
        digest = key_digest(bearer)
        if any(hmac.compare_digest(known, digest) for known in self._tenants):
            return True
        stored = self._stored.get(digest)
        return stored is not None and stored.is_operator and self._tenant(bearer) is not None

    def take_used_ids(self) -> frozenset[str]:
        """The ids of the stored keys that were used since the last call."""
        used = frozenset(self._used_ids)
        self._used_ids.clear()
        return used

    def _tenant(self, bearer: str) -> str | None:
        """The tenant of a valid key. What is looked up is a digest: how long that takes tells nothing of any key."""
        digest = key_digest(bearer)
        for known, tenant in self._tenants.items():  # all of them are few
            if hmac.compare_digest(known, digest):
                return tenant
        stored = self._stored.get(digest)
        if stored is None or not hmac.compare_digest(stored.digest, digest) or not stored.is_valid(self._clock()):
            return None
        self._used_ids.add(stored.key_id)
        return stored.key_id
