"""Accounts for everything: where they are set, nothing but the login form is reached without one.

Gradio asks for the login on most of its paths, and lets some through (cancelling, heartbeats). Here the rule is the
other way round: what is not open is closed.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fastchat.web.shell import ASSETS

_OPEN = re.compile(
    r"/(?:login/?|logout|theme\.css|favicon\.ico|manifest\.json|robots\.txt"
    rf"|(?:assets|static)/.*|page/(?:{'|'.join(map(re.escape, ASSETS))})|gradio_api/(?:theme\.css|app_id))?"
)
"""The empty page with its form, the files that draw it, and the number by which a page finds its server again."""


class LoginGate:
    """ASGI middleware. `is_known` tells whether the cookies of a request are those of somebody who is logged in."""

    def __init__(self, app: ASGIApp, is_known: Callable[[dict[str, str]], bool]) -> None:
        self._app = app
        self._is_known = is_known

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_closed = scope["type"] == "http" and _OPEN.fullmatch(scope["path"]) is None
        if is_closed and not self._is_known(HTTPConnection(scope).cookies):
            await JSONResponse({"error": "Log in first."}, 401)(scope, receive, send)
        else:
            await self._app(scope, receive, send)
