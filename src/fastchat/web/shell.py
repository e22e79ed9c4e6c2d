"""What the page adds to Gradio's HTML: its own style and script before everything else, and the headers that keep a
browser on the origin.

Scripts run only where they carry the page's nonce or come from the origin as files; `unsafe-eval` is there because
Gradio compiles its templates in the browser. Nothing that text could smuggle in (handlers, `javascript:` links, inline
scripts) is run, and nothing is fetched from anywhere else.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from functools import cache
from importlib import resources

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastchat.api.host_names import host_name
from fastchat.config import is_loopback
from fastchat.web.translation import LANGUAGES, texts

SCRIPTS = ("basics.js", "models.js", "files.js", "text.js", "drafts.js", "page.js")
"""In the order in which they run."""
ASSETS = {"page.css": "text/css", "icon.svg": "image/svg+xml", **dict.fromkeys(SCRIPTS, "text/javascript")}
_SCRIPT = re.compile(rb"<script(?=[\s>])")
_HEAD = re.compile(rb"<head>")
_META = re.compile(rb'<meta\s[^>]*(?:property="og:|name="twitter:)[^>]*/>\s*')
"""Gradio's preview cards, which name its own site."""
_FOR_EVER = "public, max-age=31536000, immutable"
"""For files whose address holds a digest of what they are: Gradio's built ones, and our own."""
_POLICY = (
    "default-src 'self'; script-src 'self' 'nonce-{nonce}' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; media-src 'self' data: blob:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; frame-src 'none'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'self'"
)


class PageShell:
    """ASGI middleware: rewrites the one HTML document, and sets the headers of all answers."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        nonce = secrets.token_urlsafe(16)
        start: Message | None = None
        parts: list[bytes] = []

        async def send_rewritten(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                _protect(headers, nonce, is_trusted=_is_trusted(scope))
                if scope["path"].startswith("/assets/") and message["status"] == 200:
                    headers["cache-control"] = _FOR_EVER
                if headers.get("content-type", "").startswith("text/html"):
                    start = message
                    return
            elif start is not None and message["type"] == "http.response.body":
                parts.append(message.get("body", b""))
                if message.get("more_body", False):
                    return
                html = b"".join(parts) if scope["method"] == "HEAD" else _rewritten(b"".join(parts), nonce)
                MutableHeaders(scope=start)["content-length"] = str(len(html))
                await send(start)
                message = {"type": "http.response.body", "body": html}
            await send(message)

        await self._app(_without_compression(scope), receive, send_rewritten)


def asset_response(name: str) -> Response:
    """One of the page's own files."""
    return Response(_asset(name), media_type=ASSETS[name], headers={"cache-control": _FOR_EVER})


def _without_compression(scope: Scope) -> Scope:
    """For the HTML alone: it has to be read here."""
    if scope["path"] not in {"", "/"}:
        return scope
    headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
    return {**scope, "headers": headers}


def _is_trusted(scope: Scope) -> bool:
    """Whether a browser trusts where it is: by TLS, here or at a proxy, or because it is on this machine."""
    headers = Headers(scope=scope)
    is_here = is_loopback(host_name(headers.get("host", "")))
    return is_here or "https" in (scope["scheme"], headers.get("x-forwarded-proto"))


def _protect(headers: MutableHeaders, nonce: str, *, is_trusted: bool) -> None:
    for name in [name for name in headers if name.startswith("access-control-")]:
        del headers[name]  # Gradio lets origins of this machine read, and any where it is not called by localhost
    headers["content-security-policy"] = _POLICY.format(nonce=nonce)
    headers["x-content-type-options"] = "nosniff"
    headers["referrer-policy"] = "no-referrer"
    headers["x-frame-options"] = "SAMEORIGIN"
    if is_trusted:  # elsewhere browsers do not obey it, and complain of it with every visit
        headers["cross-origin-opener-policy"] = "same-origin"


def _rewritten(html: bytes, nonce: str) -> bytes:
    html = _HEAD.sub(lambda _: b"<head>" + _own_head(), _META.sub(b"", html), count=1)
    return _SCRIPT.sub(b'<script nonce="%s"' % nonce.encode(), html)


@cache
def _own_head() -> bytes:
    tables = json.dumps({language: texts(language) for language in LANGUAGES}, ensure_ascii=False).replace(
        "<", "\\u003c"
    )
    style, icon, *scripts = (f"page/{name}?{_digest(name)}" for name in ("page.css", "icon.svg", *SCRIPTS))
    return (
        f'<link rel="icon" type="image/svg+xml" href="./{icon}"><link rel="stylesheet" href="./{style}">'
        f"<script>window.fastchatTexts = {tables};</script>"
        + "".join(f'<script src="./{script}"></script>' for script in scripts)
    ).encode()


@cache
def _asset(name: str) -> bytes:
    return resources.files("fastchat.web").joinpath("assets", name).read_bytes()


@cache
def _digest(name: str) -> str:
    return hashlib.sha256(_asset(name)).hexdigest()[:16]
