"""A request's JSON body, with every limit applied before and while it is read.

Lenient where people are: a bare `curl -d '{...}'` says `application/x-www-form-urlencoded` and is read as JSON.
Strict where it matters: bytes are counted as they come, whatever Content-Length says; too deep, twice the same key, or
anything but an object is a 400.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from fastchat.errors import BodyTooLargeError, InvalidRequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_JSON_DEPTH = 64
BODY_DEADLINE_S = 30.0
"""How long a client may take to send its body."""

# Every key ends like this; so may the inside of a string, which is why this count is only an upper bound.
_END_OF_KEY = re.compile(rb'"[ \t\r\n]*:')


async def read_json_object(
    request: Request, *, max_bytes: int = MAX_BODY_BYTES
) -> dict[str, Any]:  # JSON has any value
    """The request's body as a JSON object. Raises `InvalidRequestError`, `BodyTooLargeError` or a 415."""
    return parse_json_object(await read_body(request, max_bytes=max_bytes))


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The request's body as bytes, at most `max_bytes` of them, within `BODY_DEADLINE_S`."""
    _check_kind(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) <= 20 and int(declared) > max_bytes:
        raise BodyTooLargeError(max_bytes)
    try:
        async with asyncio.timeout(BODY_DEADLINE_S):
            return await _read_at_most(request, max_bytes)
    except TimeoutError:
        raise InvalidRequestError(
            f"The request body did not arrive within {BODY_DEADLINE_S:.0f} seconds.", code="body_timeout"
        ) from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON object from bytes. Raises `InvalidRequestError` for anything else."""
    try:
        document = orjson.loads(body)  # knows its own depth limit of 1024, so nesting cannot overflow its stack
    except orjson.JSONDecodeError as error:
        raise InvalidRequestError(
            f"The request body is not valid JSON: {_reason(error)}.", code="invalid_json"
        ) from None
    if not isinstance(document, dict):
        raise InvalidRequestError(
            f"The request body must be a JSON object, not {_KINDS.get(type(document), 'a number')}.",
            code="invalid_json",
        )
    if len(_END_OF_KEY.findall(body)) != _count_keys(document):
        _refuse_double_keys(body)
    return document


_KINDS: dict[type, str] = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith("multipart/"):
        raise HTTPException(415, "The request body must be JSON (Content-Type: application/json), not multipart.")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise HTTPException(415, "The request body must not be compressed; leave Content-Encoding out.")


async def _read_at_most(request: Request, max_bytes: int) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunk: bytes = message.get("body", b"")
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise BodyTooLargeError(max_bytes)
        if not message.get("more_body", False):
            return b"".join(chunks) + chunk if chunks else chunk
        chunks.append(chunk)


def _reason(error: orjson.JSONDecodeError) -> str:
    return f"{error.msg} at line {error.lineno} column {error.colno}"


def _count_keys(document: dict[str, Any]) -> int:
    """The number of keys in all objects, level by level. Raises `InvalidRequestError` below `MAX_JSON_DEPTH` levels."""
    num_keys = 0
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for container in level:
            if type(container) is dict:
                num_keys += len(container)
                children += [value for value in container.values() if type(value) in (dict, list)]
            else:
                children += [value for value in container if type(value) in (dict, list)]
        if not children:
            return num_keys
        level = children
    raise InvalidRequestError(f"The request body is nested deeper than {MAX_JSON_DEPTH} levels.", code="invalid_json")


def _refuse_double_keys(body: bytes) -> None:
    """The exact and slow check; only a body whose quick count leaves a doubt comes here."""

    def checked(pairs: list[tuple[str, Any]]) -> None:
        names = [name for name, _ in pairs]
        if len(set(names)) != len(names):
            name = next(name for name in names if names.count(name) > 1)
            raise InvalidRequestError(f"The request body has the key `{name[:64]}` twice.", code="invalid_json")

    json.loads(body, object_pairs_hook=checked)
