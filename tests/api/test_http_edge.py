"""The HTTP edge: errors as OpenAI's bodies, bodies read within limits, streams that always end."""

import asyncio
import http.client
import json
import time
from contextlib import contextmanager

import pytest
from fastapi import APIRouter, FastAPI, Request, WebSocket
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from fastchat.api.http_edge import (
    BearerGuard,
    ClientLeftError,
    EventStreamResponse,
    error_body,
    error_event,
    install_error_handlers,
    parse_json_object,
    read_json_object,
    run_until_disconnect,
)
from fastchat.errors import (
    AuthenticationError,
    BodyTooLargeError,
    CheckpointError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    RouteNotFoundError,
    UnavailableError,
)
from tests.gateway.loop_thread import LoopThread

MAX_BYTES = 1000


class Item(BaseModel):
    size: int


class Witness:
    """What the app's endpoints saw; events are waited for by the tests."""

    def __init__(self):
        self.closed = asyncio.Event()
        self.closed_at = 0.0
        self.work_began = asyncio.Event()
        self.num_yielded = 0

    def note_closed(self):
        self.closed_at = time.monotonic()
        self.closed.set()


routes = APIRouter()


@routes.get("/bug")
async def bug():
    raise ValueError("the secret of /usr/lib")


@routes.get("/engine")
async def engine():
    raise EngineError("logits of layer 3 were NaN")


@routes.post("/item")
async def take_item(item: Item):
    return item


@routes.post("/json")
async def read(request: Request):
    return await read_json_object(request, max_bytes=MAX_BYTES)


@routes.get("/work")
async def work(request: Request):
    witness = request.app.state.witness

    async def wait():
        witness.work_began.set()
        try:
            await asyncio.Event().wait()
        finally:
            witness.note_closed()

    await run_until_disconnect(request, wait())


@routes.get("/answer")
async def answer(request: Request):
    async def give():
        return {"answer": 42}

    return await run_until_disconnect(request, give())


@routes.get("/stream/{kind}")
async def stream(kind: str, request: Request):
    return EventStreamResponse(events(kind, request.app.state.witness), {"x-more": "1"})


@routes.websocket("/socket")
async def open_socket(socket: WebSocket):
    await socket.accept()


def is_allowed(key):
    if key == "explode":
        raise RuntimeError("the key store is gone")
    return key == "good"


def create_app(witness):
    app = FastAPI(openapi_url=None)
    app.state.witness = witness
    app.include_router(routes)
    app.add_middleware(BearerGuard, is_allowed=is_allowed, open_paths=("/livez",))
    install_error_handlers(app, request_id_header="x-fastchat-request-id")
    return app


async def events(kind, witness):
    try:
        if kind == "refused":
            raise InvalidRequestError("no", param="top_p")
        for number in range(3 if kind != "endless" else 10**9):
            yield b"data: %d\n\n" % number
            witness.num_yielded += 1
            await asyncio.sleep(0.01 if kind == "endless" else 0)
        if kind == "lost":
            raise UnavailableError("The worker was lost.", code="worker_lost")
        if kind == "bug":
            raise ValueError("the secret of /usr/lib")
        yield b"data: [DONE]\n\n"
    finally:
        witness.note_closed()


@pytest.fixture(scope="module")
def thread():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def witness():
    return Witness()


@pytest.fixture
def connect(thread, witness):
    """Makes connections to the app."""
    with thread.serve(create_app(witness)) as url:

        @contextmanager
        def connection():
            client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
            try:
                yield client
            finally:
                client.close()

        yield connection


@pytest.fixture
def ask(connect):
    """One request: status, headers, body."""

    def ask(method, path, body=None, headers=None, key="good"):
        with connect() as client:
            client.request(method, path, body, {"Authorization": f"Bearer {key}", **(headers or {})})
            response = client.getresponse()
            return response.status, response.headers, response.read()

    return ask


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequestError("x", param="n"), 400, "invalid_request_error", None),
        (
            ContextLengthError(num_prompt_tokens=9, max_tokens=8, max_context=16),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (AuthenticationError("x"), 401, "invalid_request_error", "invalid_api_key"),
        (PermissionDeniedError("x"), 403, "invalid_request_error", "permission_denied"),
        (ModelNotFoundError("a", ["b"]), 404, "invalid_request_error", "model_not_found"),
        (RouteNotFoundError("x"), 404, "invalid_request_error", "route_not_found"),
        (BodyTooLargeError(7), 413, "invalid_request_error", "body_too_large"),
        (UnavailableError("x", code="no_worker"), 503, "server_error", "no_worker"),
        (EngineError("x"), 500, "server_error", "internal_error"),
        (CheckpointError("x"), 500, "server_error", "internal_error"),
    ],
)
def test_every_error_has_one_status_and_openais_shape(error, status, kind, code):
    got, body, _ = error_body(error, "abc")
    document = json.loads(body)
    assert list(document) == ["error"]
    assert list(document["error"]) == ["message", "type", "param", "code"]
    assert (got, document["error"]["type"], document["error"]["code"]) == (status, kind, code)
    assert error_event(error, "abc") == b"data: " + body + b"\n\n"
    assert ("its log has the cause (request id abc)" in document["error"]["message"]) == (status == 500)


@pytest.mark.parametrize(("asked", "told"), [(0, "1"), (30, "30"), (7200, "120")])
def test_a_client_is_told_to_come_back_within_two_minutes(asked, told):
    """OpenAI's client gives up for good when Retry-After is longer."""
    assert error_body(UnavailableError("x", retry_after_s=asked))[2] == {"retry-after": told}


def test_a_message_that_is_no_unicode_still_goes_out():
    assert json.loads(error_body(InvalidRequestError("a\ud800b"))[1])["error"]["message"] == "a?b"


@pytest.mark.parametrize("path", ["/bug", "/engine"])
def test_our_own_fault_is_a_constant_text_with_the_request_id(ask, path):
    status, headers, body = ask("GET", path)
    message = json.loads(body)["error"]["message"]
    request_id = headers["x-request-id"]
    assert status == 500
    assert message == f"The server failed to answer this request; its log has the cause (request id {request_id})."


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nope", 404, "route_not_found"), ("PUT", "/json", 405, "method_not_allowed")],
)
def test_unknown_routes_and_methods_have_the_same_shape(ask, method, path, status, code):
    got, headers, body = ask(method, path)
    assert (got, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["x-request-id"]


def test_a_declared_body_that_is_wrong_is_a_400_that_names_the_field(ask):
    status, _, body = ask("POST", "/item", '{"size": "big"}', {"Content-Type": "application/json"})
    assert (status, json.loads(body)["error"]["param"]) == (400, "size")


@pytest.mark.parametrize(("sent", "is_taken"), [("abc-123_X", True), ("", False), ("a b", False), ("x" * 65, False)])
def test_a_plain_id_of_our_own_header_is_taken(ask, sent, is_taken):
    _, headers, _ = ask("GET", "/answer", headers={"x-fastchat-request-id": sent, "x-request-id": "theirs"})
    assert (headers["x-request-id"] == sent) == is_taken
    assert headers["x-request-id"] != "theirs"


@pytest.mark.parametrize(
    "kind",
    ["application/json", "application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8", ""],
)
def test_json_is_read_whatever_it_is_called(ask, kind):
    """A bare `curl -d` says that it sends a form."""
    status, _, body = ask("POST", "/json", '{"a": "你好 \\": {"}'.encode(), {"Content-Type": kind})
    assert (status, json.loads(body)) == (200, {"a": '你好 ": {'})


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"42",
        b'"x"',
        b"{",
        b'{"a":1}x',
        b"\xef\xbb\xbf{}",
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\xff"}',
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\\ud800"}',
        b'{"a":1,"a":1}',
        b'{"a":{"b":[{"c" :1, "d":2,"c"\n:3}]}}',
        b'{"a":' + b"[" * 64 + b"]" * 64 + b"}",
        b"[" * 900,
    ],
)
def test_what_is_no_plain_json_object_is_a_400(ask, body):
    status, _, answer = ask("POST", "/json", body)
    assert (status, json.loads(answer)["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("headers", [{"Content-Type": "multipart/form-data; boundary=x"}, {"Content-Encoding": "gzip"}])
def test_another_kind_of_body_is_a_415(ask, headers):
    status, _, body = ask("POST", "/json", b"{}", headers)
    assert (status, json.loads(body)["error"]["code"]) == (415, "unsupported_media_type")


@pytest.mark.parametrize("is_chunked", [False, True])
def test_bytes_are_counted_as_they_come(ask, is_chunked):
    """With a Content-Length or without one."""
    body = iter([b'{"a": "', b"x" * MAX_BYTES, b'"}']) if is_chunked else b"x" * (MAX_BYTES + 1)
    status, _, answer = ask("POST", "/json", body)
    assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")


def test_a_declared_length_is_refused_before_a_byte_is_sent(connect):
    with connect() as client:
        client.putrequest("POST", "/json")
        client.putheader("Authorization", "Bearer good")
        client.putheader("Content-Length", str(10**12))
        client.endheaders()
        assert client.getresponse().status == 413


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text('ab":\\{}[], \n世', max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab":\\', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text('ab":\\', max_size=3), json_values, max_size=3), st.sampled_from([None, 1]))
def test_any_object_without_double_keys_is_read_as_it_is(document, indent):
    """Strings that look like keys do not confuse the count of keys."""
    assert parse_json_object(json.dumps(document, indent=indent).encode()) == document


@given(st.dictionaries(st.text('ab":\\', max_size=3), json_values, min_size=1, max_size=3))
def test_a_key_that_comes_twice_is_always_seen(document):
    text = json.dumps(document)
    key = json.dumps(next(iter(document)))
    with pytest.raises(InvalidRequestError, match="twice"):
        parse_json_object(f"{text[:-1]}, {key}: 0}}".encode())


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
    assert witness.closed_at - left_at < 0.2


def test_work_for_a_whole_answer_is_cancelled_when_its_client_leaves(thread, connect, witness):
    with connect() as client:
        client.request("GET", "/work", headers={"Authorization": "Bearer good"})
        thread.run(witness.work_began.wait())
        left_at = time.monotonic()
    thread.run(witness.closed.wait())
    assert witness.closed_at - left_at < 0.2


def test_work_that_is_done_is_answered(ask):
    assert ask("GET", "/answer")[::2] == (200, b'{"answer":42}')


@pytest.mark.parametrize("path", ["/answer", "/nope", "/livez/", "/stream/good"])
def test_no_path_but_the_open_ones_is_reached_without_a_key(ask, path):
    for key in ("bad", "", "gööd"):
        status, headers, body = ask("GET", path, key=key.encode().decode("latin-1"))
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
        assert headers["x-request-id"]


def test_an_open_path_needs_no_key(ask):
    assert ask("GET", "/livez", key="bad")[0] == 404  # it went through to the routes, which have none


def test_a_check_that_fails_lets_nobody_in(ask):
    assert ask("GET", "/answer", key="explode")[0] == 500


@pytest.mark.parametrize(("key", "status"), [("bad", 401), ("good", 101)])
def test_a_websocket_needs_the_key_too(connect, key, status):
    handshake = {
        "Authorization": f"Bearer {key}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    with connect() as client:
        client.request("GET", "/socket", headers=handshake)
        assert client.getresponse().status == status


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
