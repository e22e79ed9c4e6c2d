"""What a web page must not do through its visitor's browser to a server that asks for no key.

Where keys are needed a foreign page has none, and nothing is checked. Without them two doors are open that CORS does
not close: a name that an attacker points at this machine (the page is then "of the same origin", and only `Host`
tells), and a simple POST that no browser asks permission for (`Origin` tells).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fastchat.api.error_bodies import error_body
from fastchat.api.host_names import HostNames, is_own_origin
from fastchat.api.request_ids import request_id_of
from fastchat.errors import PermissionDeniedError

_READING = frozenset({"GET", "HEAD", "OPTIONS"})


class BrowserGuard:
    """ASGI middleware. `allowed_hosts` are names beside localhost and addresses; None lets every name pass.

    `allowed_origins` are those of CORS; `is_open` tells at each request whether no key is needed now.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        allowed_hosts: Collection[str] | None,
        allowed_origins: Collection[str],
        is_open: Callable[[], bool],
    ) -> None:
        self._app = app
        self._names = HostNames(allowed_hosts)
        self._allowed_origins = frozenset(allowed_origins)
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._problem(scope) if scope["type"] == "http" and self._is_open() else None
        if problem is None:
            await self._app(scope, receive, send)
            return
        status, body, headers = error_body(PermissionDeniedError(problem, code="origin_not_allowed"))
        headers["x-request-id"] = request_id_of(scope)
        await Response(body, status, headers, media_type="application/json")(scope, receive, send)

    def _problem(self, scope: Scope) -> str | None:
        """Why a browser's request is refused; None for a good one, and for programs, which say nothing of the kind."""
        host = origin = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value.decode("latin-1")
            elif name == b"origin":
                origin = value.decode("latin-1")
        if host and not self._names.include(host):
            return (
                "This server does not answer to the name in `Host`; call it by localhost or its address, or start it "
                "with --allowed-hosts or with a key."
            )
        if origin is None or scope["method"] in _READING:
            return None
        if origin in self._allowed_origins or "*" in self._allowed_origins or is_own_origin(origin, host or ""):
            return None
        return "Web pages of this origin may not call this server; its operator can allow them with --allowed-origins."
