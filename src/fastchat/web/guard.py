"""What stands in front of Gradio: only the paths that the page uses exist, bodies are small JSON, nothing names a file.
Only who calls the page by a name of its own gets it, and only its own pages may write.

Gradio's server can fetch addresses, hand out files, take uploads and build components that a client names. The page
needs none of it, so none of it can be reached: an unknown path is 404 and a body that names a file is 400.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import orjson
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastchat.api.host_names import HostNames, is_own_origin

MAX_BODY_BYTES = 32 * 2**20
MAX_FORM_BYTES = 16 * 2**10
MAX_DEPTH = 32

_ID = r"[A-Za-z0-9_-]{1,64}"
_READ = re.compile(
    r"/(?:config/?|theme\.css|favicon\.ico|manifest\.json|robots\.txt|logout"
    r"|page/[a-z_-]{1,40}(?:\.[a-z]{1,5})?"
    r"|(?:assets|static)/[A-Za-z0-9_./@-]{1,200}"
    rf"|gradio_api/(?:startup-events|app_id|theme\.css|queue/data|heartbeat/{_ID}))?"
)
_WRITTEN = re.compile(r"/gradio_api/(?:queue/join|cancel|reset/?)")
_CLIMBS = re.compile(r"\.\.|//")
_LOGIN = re.compile(r"/login/?")
_FORBIDDEN_KEYS = frozenset({"path", "url", "_type", "component", "constructor_args", "file"})
"""Keys of the objects by which a client names a file, an address or a component to Gradio."""
_FLAG = "--allowed-hosts (of `fastchat serve`: --web-allowed-hosts)"
_STRANGE_NAME = (
    f"This page does not answer to the name in `Host`; call it by localhost or its address, or give {_FLAG}."
)
_STRANGE_PAGE = f"Another site may not use this page; where a proxy shows the page by that site's name, give {_FLAG}."


class Guard:
    """ASGI middleware around the whole page. `has_login` opens the form of the accounts.

    `allowed_hosts` are names beside localhost and addresses; None lets every name pass.
    """

    def __init__(self, app: ASGIApp, *, allowed_hosts: Collection[str] | None, has_login: bool = False) -> None:
        self._app = app
        self._names = HostNames(allowed_hosts)
        self._has_login = has_login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guard(scope, receive, send)
        else:  # the page has no WebSocket
            await send({"type": "websocket.close", "code": 1008})

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if (reason := self._objection_to_caller(scope)) is not None:
            await _refuse(scope, receive, send, 403, reason)
        elif method in {"GET", "HEAD"} and _READ.fullmatch(path) and _CLIMBS.search(path) is None:
            await self._app(scope, receive, send)
        elif method == "POST" and _WRITTEN.fullmatch(path):
            await self._pass_json(scope, receive, send)
        elif method == "POST" and self._has_login and _LOGIN.fullmatch(path):
            await self._pass_form(scope, receive, send)
        else:
            await _refuse(scope, receive, send, 404, "Not found.")

    def _objection_to_caller(self, scope: Scope) -> str | None:
        """Why a browser's request is refused. Programs say nothing of the kind, and may call by any address."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin, site = headers.get(b"host", ""), headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if host and not self._names.include(host):
            return _STRANGE_NAME
        if scope["method"] != "POST":
            return None
        if site in {"cross-site", "same-site"} or origin == "null":
            return _STRANGE_PAGE
        if site is not None or origin is None:  # browsers tell the site only to this machine and by TLS
            return None
        is_own = is_own_origin(origin, host) or self._names.name_page(origin, host)
        return None if is_own else _STRANGE_PAGE

    async def _pass_json(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive, MAX_BODY_BYTES)
        if body is None:
            await _refuse(scope, receive, send, 413, f"The body is larger than {MAX_BODY_BYTES} bytes.")
        elif (reason := _objection_to(body)) is not None:
            await _refuse(scope, receive, send, 400, reason)
        else:
            await self._app(scope, _replayed(body, receive), send)

    async def _pass_form(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read_body(receive, MAX_FORM_BYTES)
        if body is None:
            await _refuse(scope, receive, send, 413, f"The form is larger than {MAX_FORM_BYTES} bytes.")
        else:
            await self._app(scope, _replayed(body, receive), send)


def _objection_to(body: bytes) -> str | None:
    """Why this JSON is not handed to Gradio."""
    if not body:
        return None
    try:
        document = orjson.loads(body)  # it has a limit of depth of its own
    except orjson.JSONDecodeError:
        return "The body is not JSON."
    if not isinstance(document, dict):
        return "The body is no JSON object."
    return _objection_to_value(document.get("data"), MAX_DEPTH)


def _objection_to_value(value: Any, depth_left: int) -> str | None:  # Any: JSON
    if not isinstance(value, dict | list):
        return None
    if depth_left == 0:
        return f"The data is nested deeper than {MAX_DEPTH} levels."
    if isinstance(value, dict) and not _FORBIDDEN_KEYS.isdisjoint(value):
        return "This page takes text: no file, no address and no component."
    inner = value.values() if isinstance(value, dict) else value
    reasons = (_objection_to_value(each, depth_left - 1) for each in inner)
    return next((reason for reason in reasons if reason is not None), None)


async def _read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """The whole body, or None where it is larger or its sender left."""
    parts: list[bytes] = []
    num_bytes = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        num_bytes += len(parts[-1])
        if num_bytes > max_bytes:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what really comes."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        return waiting.pop() if waiting else await receive()

    return receive_again


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, reason: str) -> None:
    headers = {"connection": "close"} if status == 413 else None
    await JSONResponse({"error": reason}, status, headers)(scope, receive, send)
