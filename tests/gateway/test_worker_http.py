"""The HTTP client towards workers, against servers that write what the test says, byte by byte."""

import asyncio
import socket
import threading
from contextlib import asynccontextmanager

import pytest
import uvloop

from fastchat.gateway.worker_connection import MAX_BUFFERED_BYTES, MAX_HEAD_BYTES, BrokenAnswerError
from fastchat.gateway.worker_http import MAX_CONNECTING, ConnectError, WorkerHttp

OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\n"
WHOLE = OK + b"content-length: 5\r\n\r\nwhole"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n"


class ScriptedServer:
    """Answers each request of each connection with `answer`; closes behind it where `closes`."""

    def __init__(self, answer, *, closes=False, reads_body=True):
        self.answer, self.closes, self.reads_body = answer, closes, reads_body
        self.num_connections = 0
        self.heads = []

    async def serve(self, reader, writer):
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head)
                if self.reads_body:
                    await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
                writer.write(self.answer)
                if not self.reads_body:
                    await asyncio.Event().wait()
                if self.closes:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def asked(server, **options):
    """A client, and the server's address."""
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    async with WorkerHttp(**options) as http:
        yield http, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    listener.close()


async def text_of(answer):
    pieces = []
    while piece := await answer.read():
        pieces.append(piece)
    return b"".join(pieces)


async def ask_twice(server, headers=None):
    """The texts of two requests, one after the other."""
    async with asked(server) as (http, address):
        texts = []
        for _ in range(2):
            answer = await http.ask(address, "/x", headers or {}, b"body")
            assert (answer.status, answer.content_type) == (200, "text/plain")
            texts.append(await text_of(answer))
        return texts


@pytest.mark.parametrize(
    ("answer", "closes", "num_connections"),
    [
        (WHOLE, False, 1),
        (CHUNKED, False, 1),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n" + WHOLE, False, 1),
        (OK + b"connection: close\r\ncontent-length: 5\r\n\r\nwhole", False, 2),
        (OK.replace(b"1.1", b"1.0") + b"content-length: 5\r\n\r\nwhole", False, 2),
        (OK + b"\r\nwhole", True, 2),
        (WHOLE + b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nother", False, 2),
    ],
    ids=["length", "chunks", "interim", "close", "1.0", "until the end", "one more that nobody asked for"],
)
def test_an_answer_is_read_to_its_end_and_its_connection_used_again_where_it_may(answer, closes, num_connections):
    server = ScriptedServer(answer, closes=closes)
    assert asyncio.run(ask_twice(server)) == [b"whole", b"whole"]
    assert server.num_connections == num_connections


def test_a_connection_is_not_used_again_where_we_said_close():
    server = ScriptedServer(WHOLE)
    assert asyncio.run(ask_twice(server, {"connection": "close"})) == [b"whole", b"whole"]
    assert server.num_connections == 2


def test_a_request_has_our_headers_and_its_length():
    server = ScriptedServer(WHOLE)
    asyncio.run(ask_twice(server, {"authorization": "Bearer x"}))
    first, *rest = server.heads[0].decode().split("\r\n")
    assert first == "POST /x HTTP/1.1"
    assert [line.partition(":")[0] for line in rest if line] == ["host", "content-length", "authorization"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        OK + b"content-length: 9\r\n\r\nwhole",
        CHUNKED[:-5],
        OK[:-9],
        b"<html>\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        OK + b"content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nwhole",
        OK + b"a: " + b"x" * MAX_HEAD_BYTES,
        b"HTTP/1.1 100 Continue\r\n\r\n" * (MAX_HEAD_BYTES // 20),
    ],
    ids=["nothing", "short", "cut chunks", "cut head", "page", "upgrade", "two lengths", "twice", "head", "interim"],
)
def test_what_is_no_whole_answer_fails(answer):
    """And is never taken for one."""

    async def run():
        async with asked(ScriptedServer(answer, closes=True)) as (http, address):
            with pytest.raises(BrokenAnswerError):
                await text_of(await http.ask(address, "/x", {}, b"body"))

    asyncio.run(run())


def test_a_worker_that_answers_early_gets_no_more_of_a_large_body():
    """It has read the head alone; its answer is read, and the connection is not used again."""
    server = ScriptedServer(OK + b"content-length: 5\r\n\r\nwhole", reads_body=False, closes=False)

    async def run():
        async with asked(server) as (http, address):
            for _ in range(2):
                answer = await http.ask(address, "/x", {}, b"x" * 64 * 2**20)
                assert await text_of(answer) == b"whole"

    asyncio.run(run())
    assert server.num_connections == 2


def test_what_nobody_reads_is_not_taken_in():
    """The worker has to wait: what is held is bounded."""
    num_bytes = 64 * 2**20

    async def run():
        async with asked(ScriptedServer(OK + b"content-length: %d\r\n\r\n" % num_bytes + b"x" * num_bytes)) as (
            http,
            address,
        ):
            answer = await http.ask(address, "/x", {}, b"body")
            await asyncio.sleep(0.1)
            first = await answer.read()
            assert len(first) <= 2 * MAX_BUFFERED_BYTES
            assert len(first) + len(await text_of(answer)) == num_bytes

    asyncio.run(run())


def test_hundreds_of_new_connections_at_once_wait_for_their_turn():
    """Each of them is made."""
    server = ScriptedServer(WHOLE)

    async def run():
        async with asked(server) as (http, address):

            async def ask():
                answer = await http.ask(address, "/x", {}, b"body")
                await everybody_is_here.wait()
                return await text_of(answer)

            everybody_is_here = asyncio.Barrier(10 * MAX_CONNECTING)
            return await asyncio.gather(*(ask() for _ in range(10 * MAX_CONNECTING)))

    assert set(asyncio.run(run())) == {b"whole"}


def test_a_name_is_tried_at_each_of_its_addresses():
    """localhost is ::1 too, where nobody listens here."""

    async def run():
        async with asked(ScriptedServer(WHOLE)) as (http, address):
            answer = await http.ask(address.replace("127.0.0.1", "localhost"), "/x", {}, b"body")
            return await text_of(answer)

    assert asyncio.run(run()) == b"whole"


def test_workers_that_are_gone_are_forgotten():
    """One whose connections are all closed, when the next new one is asked; one with a connection is kept."""

    async def ask_four():
        gone, kept, new = ScriptedServer(WHOLE, closes=True), ScriptedServer(WHOLE), ScriptedServer(WHOLE)
        async with asked(gone) as (http, gone_at), asked(kept) as (_, kept_at), asked(new) as (_, new_at):
            for address in (gone_at, kept_at):
                await text_of(await http.ask(address, "/", {}))
            while "open=0" not in repr(http):
                await asyncio.sleep(0.01)
            await text_of(await http.ask(new_at, "/", {}))
            assert [address in repr(http) for address in (gone_at, kept_at, new_at)] == [False, True, True]

    asyncio.run(asyncio.wait_for(ask_four(), 20))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_machine_that_is_gone_without_a_word_is_noticed(new_loop):
    """By the system's probes: an answer has no time limit, and no table tells of a machine while its controller is gone
    too. A request that nobody acknowledges is repeated for a quarter of an hour otherwise, and nothing is probed."""

    def options_of(connected):
        names = ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
        probes = [connected.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in names]
        return connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), *probes

    async def run():
        async with asked(ScriptedServer(WHOLE)) as (http, address):
            await text_of(await http.ask(address, "/x", {}))
            (line,) = http._lines.values()
            (connection,) = line._all
            return options_of(connection._transport.get_extra_info("socket"))

    with asyncio.Runner(loop_factory=new_loop) as runner:
        is_on, idle_s, pause_s, number, unacknowledged_ms = runner.run(run())
    assert is_on
    assert idle_s + number * pause_s <= 30
    assert 0 < unacknowledged_ms <= 30_000


def test_name_that_nobody_resolves_holds_up_nothing_else(monkeypatch):
    """Neither other work in threads, such as reading a large body, nor a worker that is named by its address."""
    look_up, is_over = socket.getaddrinfo, threading.Event()

    def silent(host, *rest, flags=0, **named):
        if host == "silent.example" and not flags & socket.AI_NUMERICHOST:
            is_over.wait(60)
        return look_up(host, *rest, flags=flags, **named)

    monkeypatch.setattr(socket, "getaddrinfo", silent)

    async def run():
        async with asked(ScriptedServer(WHOLE), connect_timeout_s=0.5) as (http, address):
            asking = [http.ask("http://silent.example:1", "/x", {}) for _ in range(2 * MAX_CONNECTING)]
            failing = asyncio.gather(*asking, return_exceptions=True)
            await asyncio.sleep(0)
            try:
                async with asyncio.timeout(30):
                    assert await asyncio.to_thread(int) == 0
                    assert await text_of(await http.ask(address, "/x", {})) == b"whole"
                    assert {type(each) for each in await failing} == {ConnectError}
            finally:
                is_over.set()

    asyncio.run(run())


def test_nobody_listens():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))

        async def run():
            async with WorkerHttp() as http:
                with pytest.raises(ConnectError):
                    await http.ask(f"http://127.0.0.1:{bound.getsockname()[1]}", "/x", {}, b"")

        asyncio.run(run())


def test_those_who_wait_behind_one_that_cannot_connect_fail_with_it():
    """A listener whose queue is full drops what comes: nobody waits for more than one limit."""

    async def run(address):
        loop = asyncio.get_running_loop()
        async with WorkerHttp(connect_timeout_s=0.5) as http:
            began = loop.time()
            asking = [http.ask(address, "/x", {}, b"") for _ in range(20 * MAX_CONNECTING)]  # in turns that is 10 s
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert {type(result) for result in results} == {ConnectError}
            return loop.time() - began

    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        assert asyncio.run(run(f"http://127.0.0.1:{listener.getsockname()[1]}")) < 7


@pytest.mark.parametrize("address", ["http://169.254.169.254", "http://[::ffff:169.254.169.254]", "http://[::1"])
def test_addresses_that_lead_nowhere_are_no_connection(address):
    async def run():
        async with WorkerHttp(connect_timeout_s=0.2) as http:
            with pytest.raises(ConnectError):
                await http.ask(address, "/x", {}, b"")

    asyncio.run(run())
