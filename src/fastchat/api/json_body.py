"""A request's JSON body, with every limit applied before and while it is read.

Lenient where people are: a bare `curl -d '{...}'` says `application/x-www-form-urlencoded` and is read as JSON.
Strict where it matters: bytes are counted as they come, whatever Content-Length says; too deep, too many values, twice
the same key, a number that would be read as another one, or anything but an object is a 400.

The parser is quick about bytes and slow about values: four million bytes of `[],[],` held a process for six seconds.
So values are counted before they are made, on the body's skeleton, in which every string is one quote:

    {"a": [1, "x,y"], "b": {}}     becomes     {": [1, "], ": {}}
"""

from __future__ import annotations

import asyncio
import json
import re
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from fastchat.api.off_the_loop import off_the_loop
from fastchat.errors import BodyTooLargeError, InvalidRequestError

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_JSON_DEPTH = 64
MAX_CONTAINERS = 32_768
"""Objects and lists together."""
MAX_STRINGS = 131_072
"""Keys included."""
MAX_VALUES = 500_000
"""A prompt may be a list of token ids."""
_BYTES_PER_VALUE = 32
BODY_DEADLINE_S = 30.0
"""How long a client may take to send its body."""

_SPELLINGS = ("application/json", "application/x-www-form-urlencoded", "text/plain", "application/octet-stream")
"""What clients call their JSON, or call it not knowing better."""

# Possessive and with an optional end, so that it is linear in whatever comes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_LONG_INTEGER = re.compile(rb"(?<![0-9.eE+-])-?+[0-9]{19,}+(?![.eE])")


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """How large a body may be and how long it may take to arrive."""

    max_bytes: int = MAX_BODY_BYTES
    deadline_s: float = BODY_DEADLINE_S


async def read_json_object(request: Request, limits: BodyLimits | None = None) -> dict[str, Any]:  # JSON has any value
    """The request's body as a JSON object. Raises `InvalidRequestError`, `BodyTooLargeError` or a 415."""
    return await parse_off_the_loop(await read_body(request, limits))


async def parse_off_the_loop(body: bytes) -> dict[str, Any]:  # JSON has any value
    """`parse_json_object`, in a thread where the body is large."""
    return await off_the_loop(lambda: parse_json_object(body), size=len(body) // _BYTES_PER_VALUE)


async def read_body(request: Request, limits: BodyLimits | None = None) -> bytes:
    """The request's body as bytes, within the limits."""
    limits = limits or BodyLimits()
    _check_kind(request)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) <= 20 and int(declared) > limits.max_bytes:
        raise BodyTooLargeError(limits.max_bytes)
    try:
        async with asyncio.timeout(limits.deadline_s):
            return await _read_at_most(request, limits.max_bytes)
    except TimeoutError:
        raise InvalidRequestError(
            f"The request body did not arrive within {limits.deadline_s:.0f} seconds.", code="body_timeout"
        ) from None


def parse_json_object(body: bytes) -> dict[str, Any]:
    """A JSON object from bytes. Raises `InvalidRequestError` for anything else."""
    _check_strings(body)
    skeleton = _STRING.sub(b'"', body)
    _check_size(skeleton)
    try:
        document = orjson.loads(body)  # knows its own depth limit of 1024, so nesting cannot overflow its stack
    except orjson.JSONDecodeError as error:
        raise _invalid_json(f"is not valid JSON: {_reason(error)}") from None
    if not isinstance(document, dict):
        raise _invalid_json(f"must be a JSON object, not {_KINDS.get(type(document), 'a number')}")
    _check_integers(skeleton)
    if skeleton.count(b":") != _count_keys(document):
        _refuse_double_key(body)
    return document


_KINDS: dict[type, str] = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def _check_kind(request: Request) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind and kind not in _SPELLINGS and not kind.endswith("+json"):
        raise HTTPException(415, "The request body must be JSON; send it with Content-Type: application/json.")
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


def _check_strings(body: bytes) -> None:
    """Refuse too many strings, by their quotes: without escaped ones there are two for each."""
    if body.count(b'"') > 2 * MAX_STRINGS:
        num_quotes = body.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"')
        if num_quotes > 2 * MAX_STRINGS:
            raise _invalid_json(f"holds more than {MAX_STRINGS} strings")


def _check_size(skeleton: bytes) -> None:
    """Refuse what would take long to read, by the numbers of its values."""
    num_containers = skeleton.count(b"[") + skeleton.count(b"{")
    for what, number, limit in (
        ("objects and lists", num_containers, MAX_CONTAINERS),
        ("values", skeleton.count(b",") + num_containers, MAX_VALUES),
    ):
        if number > limit:
            raise _invalid_json(f"holds more than {limit} {what}")


def _check_integers(skeleton: bytes) -> None:
    """Refuse an integer beyond 64 bits, which the parser would silently turn into a float."""
    for literal in _LONG_INTEGER.findall(skeleton):
        if len(literal) > 20 or not -(2**63) <= int(literal) < 2**64:
            raise _invalid_json("holds an integer beyond 64 bits")


def _count_keys(document: dict[str, Any]) -> int:
    """The number of keys in all objects, level by level. Raises `InvalidRequestError` below `MAX_JSON_DEPTH` levels."""
    num_keys = 0
    level: list[Any] = [document]
    for _ in range(MAX_JSON_DEPTH):
        children: list[Any] = []
        for container in level:
            is_object = type(container) is dict
            num_keys += len(container) if is_object else 0
            values = container.values() if is_object else container
            children += [value for value in values if type(value) is dict or type(value) is list]
        if not children:
            return num_keys
        level = children
    raise _invalid_json(f"is nested deeper than {MAX_JSON_DEPTH} levels")


def _refuse_double_key(body: bytes) -> None:
    """Find the key that is there twice; only a body that has one comes here."""

    def checked(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise _invalid_json(f"has the key `{name[:64]}` twice")
            seen.add(name)

    json.loads(body, object_pairs_hook=checked)


def _invalid_json(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"The request body {what}.", code="invalid_json")
