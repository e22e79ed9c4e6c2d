"""Errors as a client reads them: OpenAI's body `{"error": {...}}` with a status, or the same body as an event.

It knows the error tree and nothing of requests; `http_edge.py` installs it in an app, `event_stream.py` uses it where a
stream has already begun.

    status  error                                   type                    code
    400     InvalidRequestError and its branch      invalid_request_error   the error's own, `context_length_exceeded`
    401     AuthenticationError                     invalid_request_error   invalid_api_key
    403     PermissionDeniedError                   invalid_request_error   permission_denied
    404     ModelNotFoundError, RouteNotFoundError  invalid_request_error   model_not_found, route_not_found
    404     RecordNotFoundError                     invalid_request_error   the error's own, `not_found`
    405     a known path with another method        invalid_request_error   method_not_allowed
    409     ConflictError                           invalid_request_error   the error's own, `conflict`
    413     BodyTooLargeError                       invalid_request_error   body_too_large
    415     a body of another kind than JSON        invalid_request_error   unsupported_media_type
    503     UnavailableError, with Retry-After      server_error            the error's own
    500     everything else                         server_error            internal_error

No route of OpenAI's API sends 409 or 422: the client of 2023 repeats a 409 for ever and does not know 422.
"""

from __future__ import annotations

import orjson

from fastchat.errors import (
    AuthenticationError,
    BodyTooLargeError,
    ConflictError,
    FastChatError,
    ModelNotFoundError,
    PermissionDeniedError,
    RecordNotFoundError,
    RequestError,
    RouteNotFoundError,
    UnavailableError,
)

MAX_RETRY_AFTER_S = 120
"""OpenAI's client does not try again at all when it is told to wait longer than this."""

_STATUSES: tuple[tuple[type[FastChatError], int, str], ...] = (
    (AuthenticationError, 401, "invalid_api_key"),
    (PermissionDeniedError, 403, "permission_denied"),
    (ModelNotFoundError, 404, "model_not_found"),
    (RouteNotFoundError, 404, "route_not_found"),
    (RecordNotFoundError, 404, "not_found"),
    (ConflictError, 409, "conflict"),
    (BodyTooLargeError, 413, "body_too_large"),
)


def error_status(error: FastChatError) -> int:
    """The HTTP status of an error."""
    if isinstance(error, UnavailableError):
        return 503
    if not isinstance(error, RequestError):
        return 500
    return next((status for kind, status, _ in _STATUSES if isinstance(error, kind)), 400)


def error_body(error: FastChatError, request_id: str | None = None) -> tuple[int, bytes, dict[str, str]]:
    """Status, JSON body and extra headers of an error. What is our fault gets a constant text, never its own."""
    status = error_status(error)
    if isinstance(error, UnavailableError):
        headers = {"retry-after": str(min(max(error.retry_after_s, 1), MAX_RETRY_AFTER_S))}
        return status, _body(error.message, "server_error", None, error.code), headers
    if isinstance(error, RequestError):
        code = error.code or next((code for kind, _, code in _STATUSES if isinstance(error, kind)), None)
        headers = {"www-authenticate": "Bearer"} if status == 401 else {}
        return status, _body(error.message, "invalid_request_error", error.param, code), headers
    return status, internal_error_body(request_id), {}


def internal_error_body(request_id: str | None) -> bytes:
    """The body of every 500: a constant text, and where to look."""
    where = f" (request id {request_id})" if request_id else ""
    message = f"The server failed to answer this request; its log has the cause{where}."
    return _body(message, "server_error", None, "internal_error")


def http_error_body(message: str, code: str) -> bytes:
    """The body of an error that only HTTP knows, such as a wrong method."""
    return _body(message, "invalid_request_error", None, code)


def error_event(error: FastChatError, request_id: str | None = None) -> bytes:
    """The same body as one server-sent event, for a stream that has begun. Nothing may follow it, `[DONE]` neither."""
    return b"data: " + error_body(error, request_id)[1] + b"\n\n"


def internal_error_event(request_id: str | None) -> bytes:
    """The event of an unexpected failure."""
    return b"data: " + internal_error_body(request_id) + b"\n\n"


def _body(message: str, kind: str, param: str | None, code: str | None) -> bytes:
    # A lone surrogate in a message would make the serializer fail where an error must go out.
    text = message.encode("utf-8", "replace").decode("utf-8")
    return orjson.dumps({"error": {"message": text, "type": kind, "param": param, "code": code}})
