"""The id of a request: made once, kept in the ASGI scope, sent back as `x-request-id`, written into every log line."""

from __future__ import annotations

import re
import secrets

from starlette.types import Scope

_SCOPE_KEY = "fastchat.request_id"
_PLAIN_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")


def request_id_of(scope: Scope, trusted_header: bytes | None = None) -> str:
    """The request's id; the first call makes it.

    `trusted_header` names the header whose value becomes the id, where the caller of this process is ours.
    """
    request_id: str | None = scope.get(_SCOPE_KEY)
    if request_id is None:
        request_id = _given_id(scope, trusted_header) or secrets.token_hex(16)
        scope[_SCOPE_KEY] = request_id
    return request_id


def _given_id(scope: Scope, trusted_header: bytes | None) -> str | None:
    if trusted_header is None:
        return None
    value: bytes = next((value for name, value in scope["headers"] if name == trusted_header), b"")
    return value.decode("ascii") if _PLAIN_ID.fullmatch(value) else None
