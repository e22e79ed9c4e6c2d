"""Streams of events: their headers, their ends, and what a client that leaves or reads nothing costs."""

import asyncio
import json
import time

import pytest

from fastchat.api.http_edge import ClientLeftError, EventStreamResponse


def test_a_stream_has_the_headers_that_proxies_need(ask, witness):
    status, headers, body = ask("GET", "/stream/good")
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert (headers["cache-control"], headers["x-accel-buffering"], headers["x-more"]) == ("no-cache", "no", "1")
    assert body == b"data: 0\n\ndata: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert witness.closed.is_set()


def test_an_error_before_the_first_event_is_an_ordinary_answer(ask, witness):
    status, headers, body = ask("GET", "/stream/refused")
    assert (status, headers["content-type"], json.loads(body)["error"]["param"]) == (400, "application/json", "top_p")
    assert witness.closed.is_set()


@pytest.mark.parametrize(("kind", "code"), [("lost", "worker_lost"), ("bug", "internal_error")])
def test_an_error_after_it_ends_the_stream_as_an_event(ask, kind, code):
    status, _, body = ask("GET", f"/stream/{kind}")
    *_, last = body.removesuffix(b"\n\n").split(b"\n\n")
    assert status == 200
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == code
    assert b"[DONE]" not in body
    assert b"secret" not in body


def test_a_stream_is_closed_at_once_when_its_client_leaves(thread, connect, witness):
    with connect() as client:
        client.request("GET", "/stream/endless", headers={"Authorization": "Bearer good"})
        response = client.getresponse()
        assert response.read(9) == b"data: 0\n\n"
        left_at = time.monotonic()
        response.close()
    thread.run(witness.closed.wait())
    assert witness.closed_at - left_at < 10


class Source:
    """A stream's body that notes whether it was closed."""

    def __init__(self, *chunks):
        self.chunks = list(chunks)
        self.num_closed = 0

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.chunks:
            await asyncio.Event().wait()
        return self.chunks.pop(0)

    async def aclose(self):
        self.num_closed += 1


class FakeServer:
    """The server's side of ASGI: a client that stays or has left, and writes that may block."""

    def __init__(self, *, has_left=False, blocks_at=None):
        self.sent = []
        self._has_left = has_left
        self._blocks_at = blocks_at

    async def receive(self):
        if not self._has_left:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.sent.append(message)
        if len(self.sent) == self._blocks_at:
            await asyncio.Event().wait()

    async def play(self, response):
        await response({"type": "http", "headers": []}, self.receive, self.send)


def test_a_client_that_reads_nothing_is_given_up():
    """Nothing more is taken from the body while a write waits, and the body is closed."""
    source = Source(b"a", b"b", b"c")
    server = FakeServer(blocks_at=3)
    with pytest.raises(ClientLeftError):
        asyncio.run(server.play(EventStreamResponse(source, write_deadline_s=0.1)))
    assert (source.chunks, source.num_closed) == ([b"c"], 1)


def test_a_body_is_closed_even_if_nobody_waited_for_its_first_item():
    source = Source()
    with pytest.raises(ClientLeftError):
        asyncio.run(FakeServer(has_left=True).play(EventStreamResponse(source)))
    assert source.num_closed == 1


def test_a_server_that_stops_tells_the_readers():
    """The task is cancelled from outside: the stream ends with an event that says why."""
    source, server = Source(b"data: a\n\n"), FakeServer()

    async def run():
        task = asyncio.ensure_future(server.play(EventStreamResponse(source)))
        while len(server.sent) < 2:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert asyncio.run(run())
    assert b'"code":"shutting_down"' in server.sent[-1]["body"]
    assert server.sent[-1]["more_body"] is False
    assert source.num_closed == 1
