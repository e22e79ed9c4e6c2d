"""Clients that cost next to nothing: raw HTTP/1.1, answers kept as bytes and counted later."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

WORD = b" token"


@dataclass
class Answer:
    """One answer as it came; times in seconds on the monotonic clock."""

    began: float
    pieces: list[bytes] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    is_complete: bool = False

    @property
    def first_token_s(self) -> float:
        """From the request to the first piece with a token."""
        return next(at for at, piece in zip(self.times, self.pieces, strict=True) if WORD in piece) - self.began

    def check(self, num_tokens: int) -> None:
        """Raise unless it is whole, a 200, and has so many tokens."""
        body = b"".join(self.pieces)
        if not body.startswith(b"HTTP/1.1 200") or body.count(WORD) != num_tokens or b'"error"' in body:
            raise ValueError(
                f"an answer with {body.count(WORD)} of {num_tokens} tokens: {body[:300]!r} ... {body[-300:]!r}"
            )


class Client(asyncio.Protocol):
    """A connection that asks one request after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None
        self._ended: asyncio.Future[Answer] | None = None
        self._num_missing: int | None = None  # bytes of a body with a Content-Length
        self._tail = b""

    @classmethod
    async def connect(cls, url: str) -> Client:
        """A connection to `http://host:port`."""
        host, _, port = url.removeprefix("http://").partition(":")
        _, client = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return client

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Implements `asyncio.Protocol`, as do those below."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Keep it, and look whether it is the end."""
        answer = self._answer
        assert answer is not None
        if not answer.pieces and b"transfer-encoding: chunked" not in data.lower():
            head, _, body = data.partition(b"\r\n\r\n")
            length = head.lower().partition(b"content-length:")[2].split(b"\r\n", 1)[0]
            self._num_missing = int(length) - len(body)
        elif self._num_missing is not None:
            self._num_missing -= len(data)
        answer.pieces.append(data)
        answer.times.append(time.monotonic())
        self._tail = (self._tail + data)[-7:]
        if self._num_missing == 0 or (self._num_missing is None and self._tail == b"\r\n0\r\n\r\n"):
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        """An answer that is under way fails."""
        self._end(error or ConnectionError("the server closed the connection"))

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send one request and wait for the whole answer."""
        assert self._transport is not None
        self._ended = asyncio.get_running_loop().create_future()
        self._num_missing, self._tail = None, b""
        self._answer = Answer(time.monotonic())
        self._transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        return await self._ended

    def close(self) -> None:
        """End the connection."""
        assert self._transport is not None
        self._transport.close()

    def _end(self, error: Exception | None) -> None:
        ended, self._ended = self._ended, None
        if ended is None or ended.done():
            return
        if error is not None:
            ended.set_exception(error)
        elif self._answer is not None:
            ended.set_result(self._answer)


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


async def ask_many(
    url: str, body: bytes, *, num_clients: int, num_each: int, num_tokens: int, spread_s: float = 0.0
) -> tuple[list[Answer], float]:
    """`num_clients` connections that ask `num_each` times each; all answers, checked, and the seconds for all."""
    clients = [await Client.connect(url) for _ in range(num_clients)]

    async def run(client: Client, number: int) -> list[Answer]:
        await asyncio.sleep(spread_s * number / num_clients)
        return [await client.ask(HEAD, body) for _ in range(num_each)]

    began = time.monotonic()
    answers = await asyncio.gather(*(run(client, number) for number, client in enumerate(clients)))
    seconds = time.monotonic() - began
    for client in clients:
        client.close()
    flat = [answer for some in answers for answer in some]
    for answer in flat:
        answer.check(num_tokens)
    return flat, seconds
