"""API keys: held as digests, compared in constant time, turned into opaque tenant ids."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from fastchat.errors import ConfigError

_TENANT_CHARACTERS = 32


class ApiKeys:
    """The keys that a process accepts; with none of them, everybody is let in.

    `tenant_secret` (the cluster token) makes tenant ids the same in every API server of a cluster, and useless to
    anyone who would guess the key from the id.
    """

    def __init__(self, keys: Sequence[str], *, tenant_secret: str = "") -> None:
        if any(not key.strip() for key in keys):
            raise ConfigError("an API key is empty; check the commas in --api-keys.")
        self._digests = tuple({_digest(key): None for key in keys})
        self._tenant_secret = hashlib.sha256(tenant_secret.encode()).digest()

    def __repr__(self) -> str:
        return f"<ApiKeys num_keys={len(self._digests)}>"

    @property
    def is_open(self) -> bool:
        """Whether no key is needed."""
        return not self._digests

    def is_allowed(self, bearer: str) -> bool:
        """Whether `bearer` is one of the keys. Takes the same time for every wrong key of a length."""
        if self.is_open:
            return True
        digest = _digest(bearer)
        matches = 0
        for known in self._digests:  # all of them, always
            matches |= hmac.compare_digest(known, digest)
        return bool(matches)

    def tenant_of(self, bearer: str) -> str:
        """An opaque id of who holds `bearer`; "" where no key is needed."""
        if self.is_open:
            return ""
        return hmac.new(self._tenant_secret, _digest(bearer), hashlib.sha256).hexdigest()[:_TENANT_CHARACTERS]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
