"""One connection to a worker: HTTP/1.1, one request after another, each answer read as it comes.

It speaks as much HTTP as a relay needs. Nothing is followed, kept, guessed or decompressed, and what is no answer by
the book ends the connection. Which connection a request gets is `worker_http.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus

import httptools

PIECE_BYTES = 64 * 1024
"""A large body is written piece by piece, so that it does not hold up the other streams."""
MAX_BUFFERED_BYTES = 256 * 1024
"""What is read of an answer that nobody takes; then the worker has to wait."""
MAX_HEAD_BYTES = 64 * 1024


class BrokenAnswerError(OSError):
    """The connection ended before the answer did, or what came is no answer in HTTP."""


class Answer:
    """A worker's answer: its head, and its body as it comes. `close` ends it, by whatever way it is left."""

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        """By names in small letters."""
        self.has_head = False
        self._connection = connection
        self._pieces: list[bytes] = []
        self._num_buffered = 0
        self._is_whole = False
        self._failure: OSError | None = None
        self._news: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Answer {self.status} {'whole' if self._is_whole else 'under way'}>"

    @property
    def content_type(self) -> str:
        """The kind of body, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def read(self) -> bytes:
        """All that has come and was not read yet, at least a byte; b"" at the proper end. Raises `OSError`."""
        while not self._pieces:
            if self._is_whole:
                return b""
            await self.wait()
        pieces, self._pieces = self._pieces, []
        self._num_buffered = 0
        self._connection.resume_reading(self)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def wait(self) -> None:
        """Until something is new: the head, bytes, the end, room for more of the request. Raises `OSError`."""
        if self._failure is not None:
            raise self._failure
        self._news = asyncio.get_running_loop().create_future()
        try:
            await self._news
        finally:
            self._news = None

    def close(self) -> None:
        """Close the connection, unless the answer was whole and the connection is another one's by now."""
        if not self._is_whole:
            self._connection.abort()

    def wake(self) -> None:
        """Something is new."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def begin(self, status: int, headers: dict[str, str]) -> None:
        """The head is here."""
        self.status, self.headers, self.has_head = status, headers, True
        self.wake()

    def feed(self, piece: bytes) -> bool:
        """Bytes of the body; whether that is enough for the moment."""
        self._pieces.append(piece)
        self._num_buffered += len(piece)
        self.wake()
        return self._num_buffered > MAX_BUFFERED_BYTES

    def finish(self, failure: OSError | None) -> None:
        """The last byte has come, or none will."""
        self._is_whole = failure is None
        self._failure = failure
        self.wake()


class Connection(asyncio.Protocol):
    """An open connection. `on_free` is called when it may have its next request, `on_lost` when it is gone."""

    def __init__(self, on_free: Callable[[Connection], None], on_lost: Callable[[Connection], None]) -> None:
        self._on_free = on_free
        self._on_lost = on_lost
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None  # of the request that is under way
        self._headers: dict[str, str] = {}
        self._num_head_bytes = 0
        self._may_be_kept = False  # the request is sent whole, and another one may follow
        self._is_reading = True
        self._is_writing_paused = False

    def __repr__(self) -> str:
        state = "closed" if not self.is_open else "busy" if self._answer else "free"
        return f"<Connection {state}>"

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, head: bytes, body: bytes, *, is_last: bool) -> Answer:
        """Send a request and wait for its answer's head. Raises `OSError`; the connection is closed then.

        After the last one the connection is not used again, whatever the answer says.
        """
        assert self._answer is None
        assert self._transport is not None
        self._answer = answer = Answer(self)
        self._may_be_kept = False
        try:
            if len(body) <= PIECE_BYTES:
                self._transport.write(head + body)
            else:
                await self._send_slowly(head, body, answer)
            self._may_be_kept = not answer.has_head and not is_last
            while not answer.has_head:
                await answer.wait()
        except BaseException:
            self.abort()
            raise
        return answer

    async def _send_slowly(self, head: bytes, body: bytes, answer: Answer) -> None:
        """A worker that answers before it has read all gets no more."""
        pieces = [head, *(body[begin : begin + PIECE_BYTES] for begin in range(0, len(body), PIECE_BYTES))]
        for piece in pieces:
            while self._is_writing_paused and not answer.has_head:
                await answer.wait()
            if answer.has_head or self._transport is None:
                return
            self._transport.write(piece)
            await asyncio.sleep(0)

    def resume_reading(self, answer: Answer) -> None:
        """`answer` has room again."""
        if not self._is_reading and answer is self._answer and self._transport is not None:
            self._is_reading = True
            self._transport.resume_reading()

    def abort(self) -> None:
        """Close the connection now, whatever is under way."""
        if self._transport is not None:
            self._transport.abort()
        self._end(BrokenAnswerError("the connection was closed"))

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream's is no other
        """Implements `asyncio.Protocol`, as do those below."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """An answer without a length ends so; any other one is cut."""
        self._transport = None
        answer = self._answer
        is_end = exc is None and answer is not None and answer.has_head and not _tells_its_end(answer)
        self._end(None if is_end else BrokenAnswerError("the connection was lost"))
        self._on_lost(self)

    def pause_writing(self) -> None:
        """The worker reads slower than we write."""
        self._is_writing_paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._is_writing_paused = False
        if self._answer is not None:
            self._answer.wake()

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer; those that nobody asked for end the connection."""
        if self._answer is None:
            self.abort()
            return
        if not self._answer.has_head:
            self._num_head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._break(f"no answer in HTTP: {error}")
            return
        if self._answer is not None and not self._answer.has_head and self._num_head_bytes > MAX_HEAD_BYTES:
            self._break(f"a head of more than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        """Implements httptools' protocol, as do those below. An answer that nobody asked for ends the connection."""
        self._headers = {}
        if self._answer is None:
            self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of several with one name the last one counts: none that is read here may come twice."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """An interim answer (1xx) tells nothing."""
        status = self._parser.get_status_code()
        if self._answer is not None and status >= HTTPStatus.OK:
            self._answer.begin(status, self._headers)

    def on_body(self, body: bytes) -> None:
        """Stops reading while nobody takes what has come."""
        if self._answer is not None and self._answer.feed(body) and self._transport is not None:
            self._is_reading = False
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self._answer is None or not self._answer.has_head:
            return
        if not self._may_be_kept or not self._parser.should_keep_alive():
            self._end(None)
            self.abort()
            return
        if not self._is_reading:
            self.resume_reading(self._answer)
        self._end(None)
        self._num_head_bytes = 0
        self._on_free(self)

    def _break(self, why: str) -> None:
        self._end(BrokenAnswerError(why))
        self.abort()

    def _end(self, failure: OSError | None) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer.finish(failure)


def _tells_its_end(answer: Answer) -> bool:
    """Whether the head says where the body ends, so that the connection's end is none."""
    return "content-length" in answer.headers or "transfer-encoding" in answer.headers
