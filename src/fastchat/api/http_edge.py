"""The HTTP edge of every process: the one place where an error becomes a status and OpenAI's body.

Used by the worker, the API server and the controller. The pieces live in their own files and are imported from here:
bodies (`json_body`), streams (`event_stream`), clients that leave (`disconnect`), keys (`bearer_guard`).
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus

import structlog
from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastchat.api.bearer_guard import BearerGuard, bearer_key
from fastchat.api.disconnect import ClientLeftError, run_until_disconnect
from fastchat.api.error_bodies import (
    error_body,
    error_event,
    error_status,
    http_error_body,
    internal_error_body,
)
from fastchat.api.event_stream import EventStreamResponse
from fastchat.api.json_body import (
    MAX_BODY_BYTES,
    parse_json_object,
    parse_off_the_loop,
    read_body,
    read_json_object,
)
from fastchat.api.request_ids import request_id_of
from fastchat.errors import FastChatError, InvalidRequestError, UnavailableError

__all__ = [
    "MAX_BODY_BYTES",
    "BearerGuard",
    "ClientLeftError",
    "EventStreamResponse",
    "bearer_key",
    "error_body",
    "error_event",
    "error_response",
    "error_status",
    "install_error_handlers",
    "parse_json_object",
    "parse_off_the_loop",
    "read_body",
    "read_json_object",
    "request_id_of",
    "run_until_disconnect",
]

_log = structlog.get_logger(__name__)
_NO_SNIFF = (b"x-content-type-options", b"nosniff")
"""A browser takes no answer for a page, whatever a model writes."""
_STOPPING = UnavailableError("The server is shutting down and ended this request early.", code="shutting_down")


def install_error_handlers(app: Starlette, *, request_id_header: str | None = None) -> None:
    """Make every error of `app` an answer in OpenAI's shape, and every answer carry its request id.

    `request_id_header` names the header whose value is taken as the id, where the caller is another process of ours.
    Call it after `app.add_middleware(BearerGuard, ...)`: the middleware added last is the outermost.
    """
    app.add_exception_handler(FastChatError, _answer_error)
    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_middleware(_Edge, request_id_header=request_id_header)


def error_response(request: Request, error: FastChatError) -> Response:
    """An error as an answer, for code that cannot raise it."""
    status, body, headers = error_body(error, request_id_of(request.scope))
    return Response(body, status, headers, media_type="application/json")


class _Edge:
    """ASGI middleware: gives each request its id, and answers what nothing else did."""

    def __init__(self, app: ASGIApp, request_id_header: str | None = None) -> None:
        self._app = app
        self._request_id_header = request_id_header.lower().encode("ascii") if request_id_header else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope, self._request_id_header)
        header = (b"x-request-id", request_id.encode("ascii"))
        has_started = False

        async def send_with_id(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                kept = (pair for pair in message.get("headers", ()) if pair[0] != header[0])
                message["headers"] = [*kept, header, _NO_SNIFF]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except (ClientLeftError, ClientDisconnect):
            _log.debug("client left", request_id=request_id)
        except asyncio.CancelledError:
            # The server stops and lets nobody go on: the one who cancels is not waiting for us. A stream has said so.
            _log.warning("request ended early, the server stops", request_id=request_id, path=scope["path"])
            if not has_started:
                status, body, headers = error_body(_STOPPING, request_id)
                await Response(body, status, headers, media_type="application/json")(scope, receive, send_with_id)
        except Exception:  # noqa: BLE001 - the top of a request: whatever it is, the client is told
            _log.exception("request failed unexpectedly", request_id=request_id, path=scope["path"])
            if not has_started:  # else the server sees an unfinished answer and closes the connection
                response = Response(internal_error_body(request_id), 500, media_type="application/json")
                await response(scope, receive, send_with_id)


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FastChatError)
    if error_status(error) == 500:
        _log.error("request failed", request_id=request_id_of(request.scope), cause=error.message, exc_info=error)
    return error_response(request, error)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong method, and 415 from the body's reader."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.scope['path'][:200]}"
    if error.status_code == 404:
        body = http_error_body(f"There is no route {where}.", "route_not_found")
    elif error.status_code == 405:
        body = http_error_body(f"The route {where} does not exist with this method.", "method_not_allowed")
    else:
        code = HTTPStatus(error.status_code).name.lower()
        body = http_error_body(str(error.detail), code)
    return Response(body, error.status_code, error.headers, media_type="application/json")


async def _answer_validation_error(request: Request, error: Exception) -> Response:
    """FastAPI's 422 of a declared body, as the 400 that OpenAI's clients know."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"] if part not in ("body", "query", "path")) or None
    message = f"{param}: {first['msg']}" if param else str(first["msg"])
    return error_response(request, InvalidRequestError(message, param=param))
