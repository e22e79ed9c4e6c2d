"""One log line for each HTTP request: who, what, how it ended, how long. No query string, no body, no key."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastchat.ops.logs import log_frequent

QUIET_PATHS = frozenset({"/livez", "/health", "/metrics"})
"""Asked every few seconds by machines: their lines are debug."""
CLIENT_LEFT_STATUS = 499
"""What stands for a status when the client left before there was one (nginx's convention)."""
_MAX_PATH_CHARACTERS = 200

_log = logging.getLogger(__name__)


class AccessLog:
    """ASGI middleware, the outermost one. Lines of paths that begin with a quiet one are debug.

    The request id is the one that the app answers with as `x-request-id`.
    """

    def __init__(self, app: ASGIApp, quiet_paths: Collection[str] = QUIET_PATHS) -> None:
        self._app = app
        self._quiet_paths = tuple(quiet_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        status, request_id = CLIENT_LEFT_STATUS, "-"

        async def send_and_note(message: Message) -> None:
            nonlocal status, request_id
            if message["type"] == "http.response.start":
                status = message["status"]
                request_id = _request_id(message) or request_id
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            client = scope.get("client")
            log_frequent(
                _log,
                logging.DEBUG if scope["path"].startswith(self._quiet_paths) else logging.INFO,
                "request",
                method=scope["method"],
                path=scope["path"][:_MAX_PATH_CHARACTERS],
                status=status,
                duration_s=round(time.monotonic() - began, 4),
                client=client[0] if client else "-",
                request_id=request_id,
            )


def _request_id(message: Message) -> str:
    for name, value in message.get("headers", ()):
        if name.lower() == b"x-request-id":
            return bytes(value).decode("latin-1")
    return ""
