"""What comes back from a worker, judged: a whole answer, or a stream whose first events are here.

A worker of ours speaks OpenAI's shapes. A server that an operator registered may send anything, and nothing but those
shapes reaches a client.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import orjson
import structlog

from fastchat.api.streaming import DONE_EVENT
from fastchat.cluster.contract import IGNORED_HEADER, WorkerEntry
from fastchat.errors import UnavailableError
from fastchat.gateway.event_framer import BrokenStreamError, EventFramer
from fastchat.gateway.exchange import LOST, Exchange

MAX_ANSWER_BYTES = 64 * 1024 * 1024
"""Embeddings of many long inputs as decimal numbers are tens of megabytes."""
BAD_ANSWER = "bad_worker_answer"
SHUTTING_DOWN = "shutting_down"
"""The code of a worker that ends what it still answers: another one may go on with it."""
REFUSED = "worker_refused"

_PASSED_HEADERS = (IGNORED_HEADER, "retry-after")
_PASSED_ERROR_STATUSES = frozenset({400, 403, 404, 413, 415, 429, 500})
_AS_400 = frozenset({405, 409, 422})
"""Statuses that OpenAI's clients do not know or repeat for ever."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer to be sent as it is."""

    status: int
    body: bytes
    headers: Mapping[str, str]


Resume = Callable[[bytes, UnavailableError], "Awaitable[RelayedStream]"]
"""Gets the tags of what was sent and the failure; gives the rest as a stream of its own, or raises the failure."""


class RelayedStream:
    """A worker's events without their tags, as they come. Closing it closes the connection, and the worker aborts."""

    def __init__(self, exchange: Exchange, request_id: str, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._exchange = exchange
        self._request_id = request_id
        self._framer = EventFramer(has_tags=not exchange.worker.is_external)
        self._first_events: bytes | None = None
        self._is_finished = False
        self._owned = ExitStack()
        self._callbacks = ExitStack()
        self._resume: Resume | None = None

    def __aiter__(self) -> RelayedStream:
        return self

    async def __anext__(self) -> bytes:
        if self._first_events is not None:
            events, self._first_events = self._first_events, None
            return events
        events = await self._next_events()
        if not events:
            raise StopAsyncIteration
        return events

    async def wait_for_first_events(self) -> None:
        """Until there is something to send. Until then another worker may still be asked instead."""
        self._first_events = await self._next_events()

    def own(self, resources: ExitStack) -> None:
        """Take over what must be released when the stream ends."""
        self._owned = resources

    def resume_with(self, resume: Resume) -> None:
        """Ask `resume` for the rest of the stream where its worker is lost."""
        self._resume = resume

    def on_close(self, action: Callable[[], None]) -> None:
        """Call `action` when the stream ends, by whatever way."""
        self._callbacks.callback(action)

    async def aclose(self) -> None:
        """Release the worker; needs no waiting."""
        with self._callbacks:
            self._owned.close()

    async def _next_events(self) -> bytes:
        """Whole events, b"" at the proper end. Raises `UnavailableError` where the stream is cut or broken."""
        try:
            while not self._is_finished:
                if self._framer.is_shut_down:
                    return await self._go_on_elsewhere(_shut_down())
                try:
                    chunk = await self._exchange.read()
                except UnavailableError as failure:
                    return await self._go_on_elsewhere(failure)
                self._is_finished = not chunk
                events = self._framer.feed(chunk) if chunk else self._framer.finish()
                if events:
                    return events
        except BrokenStreamError as error:
            raise bad_answer(self._exchange.worker, self._request_id, f"broken stream: {error}") from error
        return b""

    async def _go_on_elsewhere(self, failure: UnavailableError) -> bytes:
        """The next events, from another worker that takes the stream over. Raises `failure` where none can.

        What was told to its end needs nobody: of that worker only its connection was cut.
        """
        if failure.code not in (LOST, SHUTTING_DOWN):
            raise failure
        if self._framer.has_ended():
            self._is_finished = True
            return b""
        if self._framer.lacks_only_done():
            self._is_finished = True
            return DONE_EVENT  # another worker would tell the usage again
        if self._resume is None or not self._framer.can_go_on():
            raise failure
        tags = bytes(self._framer.tags or b"")
        other = await self._resume(tags, failure)
        self._owned.close()
        first_events, self._exchange, self._framer, self._is_finished, self._owned = other.handed_over()
        if self._framer.tags is not None:
            self._framer.tags[:0] = tags
        return first_events

    def handed_over(self) -> tuple[bytes, Exchange, EventFramer, bool, ExitStack]:
        """All that this stream is made of, for another one that goes on with it."""
        return self._first_events or b"", self._exchange, self._framer, self._is_finished, self._owned.pop_all()


async def read_whole_answer(
    exchange: Exchange, status: int, headers: Mapping[str, str], request_id: str
) -> WholeAnswer:
    """The rest of an answer that is no stream. Raises `UnavailableError` for what no client should see."""
    body = await _read_all(exchange, request_id)
    if status == 200:
        if body.lstrip()[:1] != b"{" or body.rstrip()[-1:] != b"}":
            raise bad_answer(exchange.worker, request_id, "an answer that is no JSON object")
        return WholeAnswer(200, body, passed_headers(headers))
    error = _openai_error(body)
    if status == 503:
        raise _refusal(error, headers)
    if status == 401 or (status == 403 and exchange.worker.is_external):
        # The client's own key was accepted here; what the worker refused is ours.
        _log.error("worker refuses the API server", worker_id=exchange.worker.worker_id, request_id=request_id)
        raise UnavailableError("The worker refused the API server; its operator must look.", code=REFUSED)
    if error is None or status not in _PASSED_ERROR_STATUSES | _AS_400:
        raise bad_answer(exchange.worker, request_id, f"status {status}")
    return WholeAnswer(400 if status in _AS_400 else status, body, passed_headers(headers))


def passed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The worker's headers that a client gets."""
    return {name: headers[name] for name in _PASSED_HEADERS if name in headers}


async def _read_all(exchange: Exchange, request_id: str) -> bytes:
    chunks: list[bytes] = []
    num_bytes = 0
    while chunk := await exchange.read():
        num_bytes += len(chunk)
        if num_bytes > MAX_ANSWER_BYTES:
            raise bad_answer(exchange.worker, request_id, f"more than {MAX_ANSWER_BYTES} bytes")
        chunks.append(chunk)
    return b"".join(chunks)


def _openai_error(body: bytes) -> dict[str, Any] | None:  # Any: JSON
    """The `error` object of an error body, None where it has another shape."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) and isinstance(error.get("message"), str) else None


def _refusal(error: dict[str, Any] | None, headers: Mapping[str, str]) -> UnavailableError:  # Any: JSON
    message = error["message"] if error else "The worker takes no requests now; try again in a moment."
    code = error.get("code") if error else None
    retry_after = headers.get("retry-after", "")
    return UnavailableError(
        message,
        retry_after_s=int(retry_after) if retry_after.isdecimal() and len(retry_after) < 6 else 1,
        code=code if isinstance(code, str) else "unavailable",
    )


def _shut_down() -> UnavailableError:
    return UnavailableError("The worker is shutting down and ended this answer early; try again.", code=SHUTTING_DOWN)


def bad_answer(worker: WorkerEntry, request_id: str, what: str) -> UnavailableError:
    """The error of an answer that no client should see; `what` is for the log."""
    _log.error("worker sent a bad answer", worker_id=worker.worker_id, request_id=request_id, what=what)
    return UnavailableError("The worker's answer was incomplete or malformed; try again.", code=BAD_ANSWER)
