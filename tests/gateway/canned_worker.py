"""A worker without a model: it registers over the real control connection and does what a request's `act` says.

`python canned_worker.py CONTROLLER_URL TOKEN WORKER_ID MODEL` runs one as a process, for tests that kill it; a line on
its standard input lets its held streams go on.
"""

from __future__ import annotations

import asyncio
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastchat.api.error_bodies import error_event
from fastchat.api.streaming import DONE_EVENT, chunk_event, ids_tag, prompt_tag
from fastchat.cluster.contract import CREATED_HEADER, REQUEST_ID_HEADER, TAGS_HEADER, Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection
from fastchat.errors import UnavailableError

CREATED = 1690876019
WORDS = ("Hel", "lo", "，世界", "!")


@dataclass
class Received:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    raw_headers: list[tuple[bytes, bytes]]
    body: bytes
    left_at: float | None = None
    num_bytes_written: int = 0
    began: asyncio.Event = field(default_factory=asyncio.Event)
    left: asyncio.Event = field(default_factory=asyncio.Event)


class CannedWorker:
    """An ASGI app and its registration."""

    def __init__(self, worker_id="w1", models=("tiny",)):
        self.worker_id = worker_id
        self.models = models
        self.received: list[Received] = []
        self.arrived = asyncio.Event()
        self.pause_s = 0.0
        """Before each event of a steady stream."""
        self.may_go_on = asyncio.Event()
        """Behind the first event of a held stream."""
        self.acts = {}
        """What to do for a model, whatever the request says."""
        paths = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/tokenize", "/detokenize")
        answered = [Route(path, self._endpoint, methods=["POST"]) for path in paths]
        self.app = Starlette(routes=[*answered, Route("/livez", self._livez)])

    @asynccontextmanager
    async def registered(self, controller_url, token, address):
        """While the block runs, the controller has this worker in its table."""
        hello = Hello(
            worker_id=self.worker_id,
            address=address,
            models=tuple(ModelEntry(name=name, max_context=512, created=CREATED) for name in self.models),
        )
        connection = ControlConnection(controller_address=controller_url, token=token, hello=hello, get_load=Load)
        async with connection.keep_open():
            while not connection.is_connected:
                await asyncio.sleep(0.01)
            yield connection

    async def wait_for_request(self):
        """The newest request, once it is there."""
        while not self.received:
            self.arrived.clear()
            await self.arrived.wait()
        return self.received[-1]

    async def _livez(self, request: Request):
        return Response(orjson.dumps({"worker_id": self.worker_id}), media_type="application/json")

    async def _endpoint(self, request: Request):
        body = await request.body()
        received = Received(request.url.path, dict(request.headers), request.headers.raw, body)
        self.received.append(received)
        self.arrived.set()
        document = orjson.loads(body)
        act = self.acts.get(document["model"], document.get("act", "answer"))
        if act == "answer":
            act = "stream" if document.get("stream") else "whole"
        return Act(getattr(self, f"_{act}"), received, document)

    async def _whole(self, received, document, receive, send):
        await _send_json(send, 200, _completion(received, document))

    async def _stream(self, received, document, receive, send, *, until=None):
        has_tags = received.headers.get(TAGS_HEADER) == "1"
        await _start(send)
        await _write(send, b": keep-alive\n\n")
        for number, word in enumerate(WORDS[:until]):
            tags = ids_tag(0, number, [100 + number]) if has_tags else b""
            if has_tags and number == 0:
                tags = prompt_tag(0, [1, 2, 3]) + tags
            await _write(send, chunk_event(_chunk(received, document, word), tags))
            await asyncio.sleep(0)
        if until is None:
            await _write(send, DONE_EVENT, more_body=False)

    async def _hang(self, received, document, receive, send):
        received.began.set()
        await _wait_until_left(received, receive)

    async def _hang_in_stream(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=2)
        received.began.set()
        await _wait_until_left(received, receive)

    async def _steady_stream(self, received, document, receive, send):
        received.began.set()
        await _start(send)
        for number in range(20):
            await asyncio.sleep(self.pause_s)
            await _write(send, b"data: %d\n\n" % number)
        await _write(send, DONE_EVENT, more_body=False)

    async def _held_stream(self, received, document, receive, send):
        await _start(send)
        await _write(send, b"data: 0\n\n")
        await self.may_go_on.wait()
        await _write(send, DONE_EVENT, more_body=False)

    async def _die_in_stream(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=2)
        raise DeathError  # the server closes the connection without an end

    async def _die_waiting(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=0)
        raise DeathError

    async def _shut_down_in_stream(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=2)
        await _say_goodbye(send)

    async def _shut_down_waiting(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=0)
        await _say_goodbye(send)

    async def _tell_usage(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=len(WORDS))
        await _write(send, chunk_event({**_chunk(received, document, ""), "choices": [], "usage": {"total_tokens": 7}}))

    async def _die_behind_usage(self, received, document, receive, send):
        await self._tell_usage(received, document, receive, send)
        raise DeathError

    async def _shut_down_behind_usage(self, received, document, receive, send):
        await self._tell_usage(received, document, receive, send)
        await _say_goodbye(send)

    async def _die_behind_done(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=len(WORDS))
        await _write(send, DONE_EVENT)
        raise DeathError

    async def _shut_down_behind_done(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=len(WORDS))
        await _write(send, DONE_EVENT)
        await _say_goodbye(send)

    async def _die(self, received, document, receive, send):
        await (_start(send) if document.get("stream") else _start(send, b"application/json"))
        raise DeathError

    async def _cut_stream(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=2)
        await _write(send, b"", more_body=False)

    async def _refuse(self, received, document, receive, send):
        error = {"message": "draining", "type": "server_error", "param": None, "code": "draining"}
        await _send_json(send, 503, {"error": error}, ((b"retry-after", b"7"),))

    async def _bad_value(self, received, document, receive, send):
        error = {"message": "top_p is 7", "type": "invalid_request_error", "param": "top_p", "code": None}
        await _send_json(send, 400, {"error": error}, ((b"x-fastchat-ignored", b"frobnicate"),))

    async def _unknown(self, received, document, receive, send):
        error = {"message": "no such model", "type": "x", "param": "model", "code": "model_not_found"}
        await _send_json(send, 404, {"error": error})

    async def _conflict(self, received, document, receive, send):
        error = {"message": "odd", "type": "conflict", "param": None, "code": None}
        await _send_json(send, 409, {"error": error})

    async def _wants_key(self, received, document, receive, send):
        error = {"message": "who are you", "type": "x", "param": None, "code": "invalid_api_key"}
        await _send_json(send, 401, {"error": error})

    async def _page(self, received, document, receive, send):
        await _start(send, b"text/html")
        await _write(send, b"<html>Bad gateway /usr/lib/x.py</html>", more_body=False)

    async def _redirect(self, received, document, receive, send):
        await send({"type": "http.response.start", "status": 307, "headers": [(b"location", b"http://127.0.0.1:1/")]})
        await _write(send, b"", more_body=False)

    async def _endless_line(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=1)
        await self._flood(received, send, b"data: " + b"x" * 65536)

    async def _blank_lines(self, received, document, receive, send):
        await self._stream(received, document, receive, send, until=1)
        await self._flood(received, send, b"\n\n" * 4096)

    async def _fast_stream(self, received, document, receive, send):
        await _start(send)
        await self._flood(received, send, b"data: {" + b"x" * 8000 + b"}\n\n")

    async def _flood(self, received, send, piece):
        while True:
            await _write(send, piece)
            received.num_bytes_written += len(piece)
            await asyncio.sleep(0)


class DeathError(Exception):
    """A worker that dies, as far as the other side can see."""


class Act:
    """A response that is played by a coroutine, and cancelled when the other side leaves."""

    def __init__(self, play, received, document):
        self._play = play
        self._received = received
        self._document = document

    async def __call__(self, scope, receive, send):
        play = asyncio.ensure_future(self._play(self._received, self._document, receive, send))
        left = asyncio.ensure_future(_wait_until_left(self._received, receive))
        done, _ = await asyncio.wait({play, left}, return_when=asyncio.FIRST_COMPLETED)
        for task in (play, left):
            task.cancel()
        await asyncio.wait({play, left})
        if play in done and play.exception() is None:
            return
        if play in done and not isinstance(play.exception(), DeathError):
            raise play.exception()
        if play in done:
            return  # without having ended the answer: the server closes the connection


async def _wait_until_left(received, receive):
    while (await receive())["type"] != "http.disconnect":
        pass
    if received.left_at is None:
        received.left_at = time.monotonic()
    received.left.set()


async def _start(send, kind=b"text/event-stream; charset=utf-8"):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})


async def _write(send, body, *, more_body=True):
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


async def _say_goodbye(send):
    await _write(send, error_event(UnavailableError("Good bye.", code="shutting_down")), more_body=False)


async def _send_json(send, status, document, headers=()):
    response = Response(orjson.dumps(document), status, media_type="application/json")
    response.raw_headers.extend(headers)
    await response({"type": "http"}, None, send)


def _ids(received):
    return received.headers.get(REQUEST_ID_HEADER, "x"), int(received.headers.get(CREATED_HEADER, "0"))


def _completion(received, document):
    request_id, created = _ids(received)
    if received.path == "/v1/embeddings":
        return {
            "object": "list",
            "model": document["model"],
            "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}],
            "usage": {"prompt_tokens": 3, "total_tokens": 3},
        }
    if received.path in ("/tokenize", "/detokenize"):
        return {"tokens": [1, 2, 3]}
    message = {"role": "assistant", "content": "".join(WORDS)}
    is_chat = received.path == "/v1/chat/completions"
    return {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{request_id}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": created,
        "model": document["model"],
        "choices": [
            {"index": 0, "finish_reason": "stop", **({"message": message} if is_chat else {"text": "".join(WORDS)})}
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
    }


def _chunk(received, document, word):
    request_id, created = _ids(received)
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion.chunk",
        "created": created,
        "model": document["model"],
        "choices": [{"index": 0, "delta": {"content": word}, "finish_reason": None}],
    }


def main(controller_url, token, worker_id, model):
    """Serve on a free port, registered, until killed."""
    from tests.gateway.loop_thread import LoopThread  # here: the path is set by who starts this process

    worker = CannedWorker(worker_id, (model,))
    thread = LoopThread()
    with thread.serve(worker.app) as address:

        async def stay():
            async with worker.registered(controller_url, token, address):
                await asyncio.to_thread(sys.stdin.readline)
                worker.may_go_on.set()
                await asyncio.Event().wait()

        thread.run(stay(), limit_s=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
