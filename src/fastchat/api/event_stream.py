"""The answer that is a stream of server-sent events.

It adds to Starlette's StreamingResponse what a token stream needs: the body is always closed (Starlette leaves a
generator open when its task is cancelled while sending), a client that leaves cancels it at once, a reader that takes
nothing for a minute is cut, and a failure after the first byte goes out as an event. Memory per stream is bounded by
the server's own write buffer: `send` waits for a slow reader, and nothing is taken from the body meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress
from typing import Protocol

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fastchat.api.disconnect import ClientLeftError, expired_by_disconnect
from fastchat.api.error_bodies import error_event, internal_error_event
from fastchat.api.request_ids import request_id_of
from fastchat.errors import EngineError, FastChatError, UnavailableError

WRITE_DEADLINE_S = 60.0
"""A client that takes no byte for this long while there are some is given up."""
_GOODBYE_DEADLINE_S = 1.0

_log = structlog.get_logger(__name__)


class EventBody(Protocol):
    """What gives the bytes of a stream: any `AsyncGenerator[bytes, None]`, or a class that must close even unread."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None:
        """End what makes the events. Called once, however the stream ended."""


class EventStreamResponse(Response):
    """Streams the events of `body`; each item is one write and holds whole events.

    Headers go out with the first item: an error that `body` raises before it becomes an ordinary error answer with its
    status. After that an error becomes an error event, which ends the stream. `body` must truly await now and then.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        body: EventBody,
        headers: Mapping[str, str] | None = None,
        *,
        write_deadline_s: float = WRITE_DEADLINE_S,
    ) -> None:
        self.events = body
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self._write_deadline_s = write_deadline_s
        self._has_started = False
        self._write_began: float | None = None  # the loop's time when the write that is under way began
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        try:
            async with asyncio.timeout(None) as patience, aclosing(self.events):
                with expired_by_disconnect(receive, patience), self._write_deadline(patience, request_id):
                    await self._send_all(send, request_id)
        except TimeoutError:
            if not patience.expired():
                raise
            raise ClientLeftError from None
        except asyncio.CancelledError:
            await self._say_goodbye(send)
            raise

    async def _send_all(self, send: Send, request_id: str) -> None:
        try:
            async for chunk in self.events:
                await self._write(send, chunk)
            last = b""
        except Exception as error:
            if not self._has_started:
                raise
            last = self._last_event(error, request_id)
        await self._write(send, last, more_body=False)

    def _last_event(self, error: Exception, request_id: str) -> bytes:
        if isinstance(error, FastChatError):
            if isinstance(error, EngineError):
                _log.error("stream failed", request_id=request_id, cause=error.message)
            return error_event(error, request_id)
        _log.error("stream failed unexpectedly", request_id=request_id, exc_info=error)
        return internal_error_event(request_id)

    async def _write(self, send: Send, chunk: bytes, *, more_body: bool = True) -> None:
        self._write_began = asyncio.get_running_loop().time()
        if not self._has_started:
            self._has_started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": chunk, "more_body": more_body})
        self._write_began = None

    async def _say_goodbye(self, send: Send) -> None:
        """The server stops and cancels what runs: its clients are told, those who still read."""
        if self._has_started:
            error = UnavailableError("The server is shutting down and ended this answer early.", code="shutting_down")
            with suppress(Exception):
                async with asyncio.timeout(_GOODBYE_DEADLINE_S):
                    await self._write(send, error_event(error), more_body=False)

    @contextmanager
    def _write_deadline(self, patience: asyncio.Timeout, request_id: str) -> Iterator[None]:
        """One slow timer for the whole stream: a timer for each write would cost more than the write."""
        self._look_at_write(patience, request_id)
        try:
            yield
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def _look_at_write(self, patience: asyncio.Timeout, request_id: str) -> None:
        loop = asyncio.get_running_loop()
        if self._write_began is not None and loop.time() - self._write_began > self._write_deadline_s:
            _log.warning("client reads nothing, stream ended", request_id=request_id)
            patience.reschedule(loop.time())
        else:
            self._timer = loop.call_later(self._write_deadline_s / 4, self._look_at_write, patience, request_id)
