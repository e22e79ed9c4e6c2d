"""What a client may send before its request is read: sizes, deadlines, and refusals in OpenAI's shape."""

import asyncio
import json
import logging
import queue
import socket
import threading
import time

import pytest
import uvloop
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fastchat.api.http_edge import (
    EventStreamResponse,
    install_error_handlers,
    read_json_object,
    run_until_disconnect,
)
from fastchat.serve.http_protocol import HeadLimits, LimitedHttpProtocol
from tests.gateway.loop_thread import LoopThread

HOST = b"Host: here\r\n"
DEADLINE_S = 2.0


class Impatient(LimitedHttpProtocol):
    """The same with a deadline that a test can wait for."""

    limits = HeadLimits(head_deadline_s=DEADLINE_S)
    unread_limit_s = 0.5
    ended_ports = queue.SimpleQueue()
    """Of the clients whose connection has ended here."""

    def connection_lost(self, exc):
        self.ended_ports.put(self.client[1])
        super().connection_lost(exc)


async def echo(request):
    return JSONResponse(await read_json_object(request))


async def slow(request):
    await asyncio.sleep(1.9 * DEADLINE_S)
    return JSONResponse({"slow": True})


async def patient(request):
    """Answers nobody; tells the test when it has begun, and when it has ended because the client left."""
    request.app.state.has_begun.set()
    try:
        await run_until_disconnect(request, asyncio.Event().wait())
    finally:
        request.app.state.has_ended.set()


async def large(request):
    return Response(bytes(64 * 2**20))


async def stream(request):
    """Ends by itself where nobody reads it."""

    async def events():
        while True:
            await asyncio.sleep(0)
            yield bytes(2**20)

    return EventStreamResponse(events(), write_deadline_s=0.4)


async def halves(request):
    """Begins its answer at once, and ends it later."""

    async def events():
        yield b"first"
        await asyncio.sleep(0.3)
        yield b"second"

    return EventStreamResponse(events())


async def early(request):
    return JSONResponse({"early": True})


@pytest.fixture(scope="module")
def app():
    """What is served."""
    routes = [Route("/echo", echo, methods=["POST"]), Route("/slow", slow), Route("/early", early, methods=["POST"])]
    app = Starlette(
        routes=[
            *routes,
            Route("/patient", patient),
            Route("/large", large),
            Route("/stream", stream),
            Route("/halves", halves),
        ]
    )
    app.state.has_begun, app.state.has_ended = threading.Event(), threading.Event()
    install_error_handlers(app)
    return app


@pytest.fixture(scope="module")
def port(app):
    thread = LoopThread()
    with thread.serve(app, http=Impatient) as url:
        yield int(url.rpartition(":")[2])
    thread.close()


@pytest.fixture
def connection(port):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        yield connection


def received(connection):
    """Everything until the server closes."""
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def next_answer(connection):
    """The bytes of one answer, which has a Content-Length."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    while len(body) < int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def answers(data):
    """(status, document) of each answer in the bytes."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        found.append((int(head.split(b" ")[1]), json.loads(data[:length])))
        data = data[length:]
    return found


def codes(data):
    return [(status, document.get("error", {}).get("code")) for status, document in answers(data)]


@pytest.mark.parametrize(
    ("request_bytes", "status", "code"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400, "invalid_http"),
        (b"__class__ / HTTP/1.1\r\n" + HOST + b"\r\n", 400, "invalid_http"),
        (b"CONNECT a:1 HTTP/1.1\r\n" + HOST + b"\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_host"),
        (b"GET / HTTP/1.1\r\n" + HOST * 2 + b"\r\n", 400, "invalid_host"),
        (b"GET http://evil.example/echo HTTP/1.1\r\n" + HOST + b"\r\n", 400, "invalid_host"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\0c\r\n\r\n", 400, "invalid_http"),
        (b"GET /" + b"x" * 65536 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 414, "url_too_long"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 100_000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: " + b"x" * 1_000_000, 431, "headers_too_large"),
        (b"GET / HTTP/1.1\r\n" + HOST + b"A: b\r\n" * 2000 + b"\r\n", 431, "too_many_headers"),
        (b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n{}", 400, "invalid_http"),
        (b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", 400, "invalid_http"),
        (
            b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
            400,
            "invalid_http",
        ),
        (b"POST /echo HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX", 400, "invalid_http"),
    ],
    ids=lambda value: repr(value[:40]) if isinstance(value, bytes) else str(value),
)
def test_what_is_no_decent_request_is_refused_in_openais_shape(connection, request_bytes, status, code):
    """At once, and the connection ends: what follows cannot be trusted."""
    connection.sendall(request_bytes)
    assert codes(received(connection)) == [(status, code)]


def test_a_url_may_name_the_host_it_is_sent_to(connection):
    """RFC 9112 3.2.2: a server accepts the absolute form."""
    body = b"Content-Length: 2\r\nConnection: close\r\n\r\n{}"
    connection.sendall(b"POST http://here/echo HTTP/1.1\r\n" + HOST + body)
    assert answers(received(connection)) == [(200, {})]


def test_the_answer_under_way_is_whole_when_garbage_follows(connection):
    """A Content-Length that is too short: the client learns what was wrong with its body, then the connection ends."""
    connection.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b'Content-Length: 2\r\n\r\n{"a": 1}')
    assert codes(received(connection)) == [(400, "invalid_json")]


@pytest.mark.parametrize("behind", [b"", b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}"])
def test_the_stream_under_way_is_whole_when_garbage_follows(connection, behind):
    """And it is the last answer."""
    connection.sendall(b"GET /halves HTTP/1.1\r\n" + HOST + b"\r\n")
    data = connection.recv(65536)
    connection.sendall(behind + b"\x16\x03\x01\r\n\r\n")
    data += received(connection)
    assert data.endswith(b"6\r\nsecond\r\n0\r\n\r\n")
    assert data.count(b"HTTP/1.1") == 1


def test_headers_that_trickle_end_at_the_deadline(connection):
    """However often a byte comes."""
    began = time.monotonic()
    connection.sendall(b"GET / HTTP/1.1\r\n" + HOST + b"A: ")
    connection.settimeout(DEADLINE_S / 10)
    data = b""
    while not data:
        connection.sendall(b"x")
        try:
            data = connection.recv(65536)
        except TimeoutError:
            assert time.monotonic() - began < 10
    connection.settimeout(10)
    assert codes(data + received(connection)) == [(408, "head_timeout")]
    assert DEADLINE_S * 0.9 < time.monotonic() - began < DEADLINE_S + 5


def test_a_request_that_waits_while_the_server_stands_still_is_answered():
    """The server's own pause is not its client's slowness."""
    stands_still = threading.Event()

    class Stalling(LimitedHttpProtocol):
        limits = HeadLimits(head_deadline_s=0.5)

        def data_received(self, data):
            if b"/still" in data:
                stands_still.set()
                time.sleep(0.5 + 1.3)
            super().data_received(data)

    thread = LoopThread(uvloop.new_event_loop())  # runs what is due before it reads again
    with thread.serve(Starlette(routes=[Route("/early", early)]), http=Stalling) as url:
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_connection(address, timeout=60) as other, socket.create_connection(address) as waiting:
            time.sleep(0.1)  # until both are accepted
            other.sendall(b"GET /still HTTP/1.1\r\n" + HOST + b"\r\n")
            assert stands_still.wait(60)
            waiting.sendall(b"GET /early HTTP/1.1\r\n" + HOST + b"\r\n")
            assert answers(next_answer(waiting)) == [(200, {"early": True})]
    thread.close()


def test_a_connection_that_says_nothing_is_closed(connection):
    assert received(connection) == b""


def test_a_request_behind_one_under_way_is_no_slow_one(connection):
    """Half of the next request's head may wait as long as the answer before it takes, and then has all of its time."""
    connection.sendall(b"GET /slow HTTP/1.1\r\n" + HOST + b"\r\nPOST /echo HTTP/1.1\r\n")
    assert answers(next_answer(connection)) == [(200, {"slow": True})]
    time.sleep(0.3 * DEADLINE_S)
    connection.sendall(HOST + b"Content-Length: 2\r\nConnection: close\r\n\r\n{}")
    assert answers(received(connection))[-1] == (200, {})


@pytest.mark.parametrize(
    "behind", [b"", b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}", b"GET /slow HT"]
)
def test_who_leaves_ends_the_request_under_way(connection, app, behind):
    """Whatever was pipelined behind it."""
    app.state.has_begun.clear()
    app.state.has_ended.clear()
    connection.sendall(b"GET /patient HTTP/1.1\r\n" + HOST + b"\r\n" + behind)
    assert app.state.has_begun.wait(60)
    connection.close()
    assert app.state.has_ended.wait(60)


def test_a_body_that_nobody_waits_for_ends_the_connection(connection):
    """The answer was given without it; it goes on for ever."""
    connection.sendall(b"POST /early HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
    data = next_answer(connection)
    connection.settimeout(0.1)
    began = time.monotonic()
    is_open = True
    while is_open and time.monotonic() - began < 10:
        try:
            connection.sendall(b"1\r\nx\r\n")
            is_open = bool(connection.recv(65536))
        except TimeoutError:
            continue
        except OSError:
            is_open = False
    assert not is_open
    assert answers(data) == [(200, {"early": True})]


@pytest.mark.parametrize("path", [b"/large", b"/stream"])
def test_a_connection_ends_that_nobody_reads_any_more(connection, caplog, path):
    """Its client would hold its memory for ever; and there is no error in the log, since nothing is wrong here."""
    connection.sendall(b"GET " + path + b" HTTP/1.1\r\n" + HOST + b"\r\n")
    own_port = connection.getsockname()[1]
    while Impatient.ended_ports.get(timeout=60) != own_port:
        pass
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_kept_connection_is_used_again(connection):
    """Limits count for each request anew."""
    for number in range(20):
        body = json.dumps({"number": number}).encode()
        head = b"POST /echo HTTP/1.1\r\n" + HOST + b"A: %s\r\nContent-Length: %d\r\n\r\n" % (b"x" * 9000, len(body))
        connection.sendall(head + body)
        assert answers(next_answer(connection)) == [(200, {"number": number})]
    time.sleep(DEADLINE_S * 1.5)  # idle is not slow
    connection.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}")
    assert answers(next_answer(connection)) == [(200, {})]


def test_blank_lines_behind_an_answer_keep_no_connection_open(app):
    """They begin no request, so the clock of an idle connection goes on."""
    thread = LoopThread()
    with (
        thread.serve(app, http=LimitedHttpProtocol, keep_alive_s=1) as url,
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection,
    ):
        connection.sendall(b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}")
        assert answers(next_answer(connection)) == [(200, {})]
        connection.sendall(b"\r\n")
        assert received(connection) == b""
    thread.close()


def test_many_requests_at_once_are_answered_in_order(connection):
    """Ten thousand on one connection."""
    one = b"POST /echo HTTP/1.1\r\n" + HOST + b"Content-Length: 2\r\n\r\n{}"
    last = one.replace(b"{}", b"[]").replace(HOST, HOST + b"Connection: close\r\n")
    connection.settimeout(0.05)
    to_send, data = memoryview(one * 9999 + last), b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if to_send:
                to_send = to_send[connection.send(to_send) :]
            chunk = connection.recv(65536)
        except TimeoutError:
            continue
        if not chunk:
            break
        data += chunk
    assert data.count(b"HTTP/1.1 200") == 9999
    assert data.count(b"HTTP/1.1 400") == 1
