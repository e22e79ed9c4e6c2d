"""uvicorn's HTTP/1.1 connection with limits on what a client may send before its request is read, and for how long.

uvicorn bounds neither the head of a request nor the time it takes to arrive, and answers what it cannot parse with
plain text. Here a head has a size, a number of headers and a deadline, a refusal has OpenAI's shape, and a body that
nobody waits for any more is not read for ever. What arrives too late or too large:

    head incomplete after `head_deadline_s`     408, or closed without a word if no byte came
    URL, headers or their number too large      414, 431
    not HTTP, no `Host`, another host's URL     400
    body goes on although it was answered       closed after `LINGER_S`
    answer given up, or whole and never read    closed after `LINGER_S`, `UNREAD_LIMIT_S`

The body itself is counted and timed where it is read, in `api/json_body.py`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import structlog
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from fastchat.api.error_bodies import http_error_body

STALL_S = 1.0
"""A timer that comes later than this tells that the whole process stood still, and nothing of any client."""
LINGER_S = 2.0
"""How long a refused client is still listened to: closing while its bytes come in would destroy the answer."""

UNREAD_LIMIT_S = 120.0
"""How long an answer that has ended waits for a client that takes nothing of it; a stream's reader has half of that."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class HeadLimits:
    """What the head of one request may be."""

    max_bytes: int = 32 * 1024
    max_url_bytes: int = 8 * 1024
    max_headers: int = 100
    head_deadline_s: float = 10.0


class _RefusedHeadError(Exception):
    """Raised inside the parser's callbacks to end the parsing; the refusal lies in the connection."""


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. A subclass with other `limits` may be given to uvicorn as well."""

    limits = HeadLimits()
    unread_limit_s = UNREAD_LIMIT_S

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],  # Any: uvicorn's own type
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._answered: RequestResponseCycle | None = None  # `cycle` is the last that was read, maybe far behind it
        self._refusal: tuple[int, str, str] | None = None
        self._is_over = False  # a refusal was sent: whatever comes now is dropped
        self._is_in_head = False
        self._is_in_message = False
        self._num_messages = 0
        self._num_head_bytes = 0  # of the chunks that were all head
        self._head_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn declares it
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._linger_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        self._tell_who_answers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        number, was_in_head = self._num_messages, self._is_in_head
        super().data_received(data)
        self._await_next_message()
        if self._is_over or not (was_in_head and self._is_in_head) or self._num_messages != number:
            return
        self._num_head_bytes += len(data)
        if self._num_head_bytes > self.limits.max_bytes:
            self._refuse(431, "headers_too_large", f"The headers are larger than {self.limits.max_bytes} bytes.")

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for everything that the parser, or a callback below, did not like."""
        self._refuse(*(self._refusal or (400, "invalid_http", msg)))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._is_in_message = True
        self._num_messages += 1
        self._num_head_bytes = 0
        self._await_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.limits.max_url_bytes:
            self._reject(414, "url_too_long", f"The URL is longer than {self.limits.max_url_bytes} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > self.limits.max_headers:
            self._reject(431, "too_many_headers", f"The request has more than {self.limits.max_headers} headers.")

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
        if sum(len(name) + len(value) for name, value in self.headers) > self.limits.max_bytes:
            self._reject(431, "headers_too_large", f"The headers are larger than {self.limits.max_bytes} bytes.")
        self._check_host()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_message = False
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_reader()
        if self._is_in_head:  # pipelined: only from now on can the rest of it be read
            self._await_head()
        if self._is_in_message and not self._is_in_head and self.cycle.response_complete:
            self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        async def to_its_end(scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
            await app(scope, receive, send)
            if cycle.response_started and not cycle.response_complete and not cycle.disconnected:
                cycle.disconnected = True  # given up on purpose, which uvicorn would log as an error
                self._close_soon()

        if self._unread_timer is not None:
            self._unread_timer.cancel()  # this answer has its own bytes in the buffer
        self._answered = cycle
        super()._start_asgi_task(cycle, to_its_end)

    def _close_soon(self) -> None:
        """Closing alone would wait for ever for a client that reads nothing."""
        self.transport.close()
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.abort)

    def _await_reader(self, num_before: int | None = None) -> None:
        """End the connection once nothing of an ended answer has been taken for `unread_limit_s`."""
        num_unread = self.transport.get_write_buffer_size()
        if self._unread_timer is not None:
            self._unread_timer.cancel()
        if num_before is not None and num_unread >= num_before:
            self.transport.abort()
        elif num_unread:
            self._unread_timer = self.loop.call_later(self.unread_limit_s, self._await_reader, num_unread)

    def _await_next_message(self) -> None:
        """uvicorn takes any bytes behind an answer for the next request; blank lines, which a server skips (RFC 9112
        2.2), begin none, and a connection without a clock stays open for ever.
        """
        is_idle = self.cycle is not None and self.cycle.response_complete and not self._is_in_message
        if is_idle and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _tell_who_answers(self) -> None:
        """uvicorn tells only the last request that its client has left, not the one before it that is answered."""
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        """No warning: a server may ignore an upgrade (RFC 9110 7.8), and uvicorn's advice here is for its developer."""

    def _check_host(self) -> None:
        """HTTP/1.1 has exactly one `Host`; a URL with a host of its own must be for that one: this is no proxy."""
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and self.parser.get_http_version() == "1.1"):
            self._reject(400, "invalid_host", "The request must have exactly one Host header.")
        if not self.url.startswith(b"/") and b"://" in self.url and urlsplit(self.url).netloc != (hosts or [b""])[0]:
            self._reject(400, "invalid_host", "The URL names another host than the Host header.")

    def _reject(self, status: int, code: str, message: str) -> None:
        """From inside the parser: remember why, and end the parsing."""
        self._refusal = (status, code, message)
        raise _RefusedHeadError

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer and end the connection. An answer that is still under way is the last one, and stays whole."""
        self._is_over = True
        answered = self._answered
        if answered is not None and not answered.response_complete:
            if not answered.more_body:
                answered.keep_alive = False
                self.pipeline.clear()
                return
            if answered.response_started:
                self.transport.close()
                return
            answered.disconnected = True  # its body will never be whole
            answered.message_event.set()
        _log.info("connection refused", code=code, status=status, client=self.client[0] if self.client else None)
        body = http_error_body(message, code)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._linger_timer = self.loop.call_later(LINGER_S, self.transport.close)

    def _await_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        due = self.loop.time() + self.limits.head_deadline_s
        self._head_timer = self.loop.call_at(due, self._end_of_patience, due)

    def _end_of_patience(self, due: float) -> None:
        if self.loop.time() - due > STALL_S:
            self._await_head()  # what the client sent meanwhile is read after the timers
        elif self.cycle is not None and not self.cycle.response_complete:
            self._await_head()  # pipelined behind an answer that is under way; nothing is read meanwhile
        elif self._is_in_head:
            deadline_s = self.limits.head_deadline_s
            self._refuse(408, "head_timeout", f"The request's headers did not arrive within {deadline_s:.0f} seconds.")
        else:
            self.transport.close()
