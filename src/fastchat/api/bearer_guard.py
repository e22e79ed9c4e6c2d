"""Default-deny for a whole app: no path but the open ones is reached without a key.

The decision reads `scope["path"]` (what the router matches), never a URL rebuilt from headers, and comes before
routing: a path that does not exist, another method or a WebSocket is refused alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastchat.api.error_bodies import error_body
from fastchat.api.request_ids import request_id_of
from fastchat.errors import AuthenticationError

_MAX_KEY_BYTES = 1024


class BearerGuard:
    """ASGI middleware. `is_allowed` compares a key in constant time; a failure in it lets nobody in.

    `hint` says which key is meant and where it lies, where that is not the user's API key. `is_open` is asked at each
    request whether no key is needed now.
    """

    def __init__(
        self,
        app: ASGIApp,
        is_allowed: Callable[[str], bool],
        open_paths: Collection[str] = (),
        *,
        hint: str = "",
        is_open: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._is_allowed = is_allowed
        self._open_paths = frozenset(open_paths)
        self._hint = hint
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_http = scope["type"] == "http"
        if scope["type"] == "lifespan" or (is_http and scope["path"] in self._open_paths) or self._is_open():
            await self._app(scope, receive, send)
            return
        key = bearer_key(scope)
        if key is not None and self._is_allowed(key):
            await self._app(scope, receive, send)
            return
        await _refuse(scope, receive, send, has_key=key is not None, hint=self._hint)


def bearer_key(scope: Scope) -> str | None:
    """The key in the one `Authorization: Bearer` header; None when it is absent, doubled or malformed."""
    values: list[bytes] = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(values) != 1 or len(values[0]) > _MAX_KEY_BYTES:
        return None
    scheme, _, key = values[0].strip().partition(b" ")
    key = key.strip()
    return key.decode("ascii") if scheme.lower() == b"bearer" and key and key.isascii() else None


async def _refuse(scope: Scope, receive: Receive, send: Send, *, has_key: bool, hint: str) -> None:
    if has_key:
        message = f"This key is not known here; check the one you send. {hint}"
    else:
        message = f"This server needs a key; send it as `Authorization: Bearer YOUR_KEY`. {hint}"
    error = AuthenticationError(message.rstrip())
    status, body, headers = error_body(error)
    headers["x-request-id"] = request_id_of(scope)
    response = Response(body, status, headers, media_type="application/json")
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008, "reason": error.message})
        return
    await response(scope, receive, send)
