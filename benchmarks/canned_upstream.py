"""A worker without a model, as fast as Python can be: what a relay in front of it costs is what is measured.

    python benchmarks/canned_upstream.py ours CONTROLLER_URL           # our worker contract; token in $CLUSTER_TOKEN
    python benchmarks/canned_upstream.py fastchat-0.2 CONTROLLER_URL   # the protocol of FastChat's workers

It serves the models `fast`, whose streams come as fast as they are taken, and `steady-R`, whose streams have R events a
second. An answer has as many tokens as `max_tokens` says, each ` token`, one event for each (FastChat's workers put
two in one unless told otherwise: `--tokens-per-event`). It prints its URL once it is registered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import urllib.request
from collections.abc import Iterator

import uvloop

from fastchat.cluster.contract import CREATED_HEADER, REQUEST_ID_HEADER, TAGS_HEADER, Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection

MODELS = ("fast", "steady-20", "steady-200")
MAX_CONTEXT = 1_000_000
WORD = b" token"
PROMPT_TOKEN_IDS = b",".join(b"%d" % number for number in range(100, 116))
CONVERSATION = {
    "name": "canned",
    "system_template": "{system_message}",
    "system_message": "",
    "roles": ["USER", "ASSISTANT"],
    "messages": [],
    "offset": 0,
    "sep_style": 1,
    "sep": "\n",
    "sep2": None,
    "stop_str": None,
    "stop_token_ids": None,
}


class OurAnswers:
    """What a worker of ours sends."""

    def whole(self, _path: str, headers: dict[str, str], body: dict) -> bytes:
        """A chat completion."""
        return json.dumps(
            {
                "id": f"chatcmpl-{headers.get(REQUEST_ID_HEADER, 'x')}",
                "object": "chat.completion",
                "created": int(headers.get(CREATED_HEADER, "0")),
                "model": body["model"],
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "length",
                        "message": {"role": "assistant", "content": WORD.decode() * body["max_tokens"]},
                    }
                ],
                "usage": {"prompt_tokens": 16, "completion_tokens": body["max_tokens"], "total_tokens": 16},
            }
        ).encode()

    def events(self, headers: dict[str, str], body: dict) -> Iterator[bytes]:
        """The chunks of a chat completion, behind their tags where they are asked for, and the end."""
        has_tags = headers.get(TAGS_HEADER) == "1"
        head = json.dumps(
            {
                "id": f"chatcmpl-{headers.get(REQUEST_ID_HEADER, 'x')}",
                "object": "chat.completion.chunk",
                "created": int(headers.get(CREATED_HEADER, "0")),
                "model": body["model"],
                "system_fingerprint": "fastchat",
            }
        ).encode()[:-1]
        start = b"data: " + head + b',"choices":[{"index":0,"delta":{'
        end = b'},"logprobs":null,"finish_reason":null}]}\n\n'
        opening = start + b'"role":"assistant","content":""' + end
        yield (b": 0 prompt %s\n: 0 0 \n" % PROMPT_TOKEN_IDS if has_tags else b"") + opening
        event = start + b'"content":"' + WORD + b'"' + end
        for number in range(body["max_tokens"]):
            yield (b": 0 %d 1234\n" % number if has_tags else b"") + event
        tag = b": 0 %d \n" % body["max_tokens"] if has_tags else b""
        yield tag + start + b'},"logprobs":null,"finish_reason":"length"}]}\n\ndata: [DONE]\n\n'


class FastChatAnswers:
    """What a worker of FastChat 0.2.36 sends: the whole text again with each event."""

    def __init__(self, tokens_per_event: int) -> None:
        self._tokens_per_event = tokens_per_event

    def whole(self, path: str, _headers: dict[str, str], body: dict) -> bytes:
        """The answer of any route but the streaming one."""
        answers = {
            "/worker_get_status": {"model_names": MODELS, "speed": 1, "queue_length": 0},
            "/model_details": {"context_length": MAX_CONTEXT},
            "/count_token": {"count": 16, "error_code": 0},
            "/worker_get_conv_template": {"conv": CONVERSATION},
        }
        if path == "/worker_generate":
            return self._event(body["max_new_tokens"], body["max_new_tokens"])
        return json.dumps(answers[path]).encode()

    def events(self, _headers: dict[str, str], body: dict) -> Iterator[bytes]:
        """Objects that end with NUL."""
        num_tokens = body["max_new_tokens"]
        step = self._tokens_per_event
        for number in range(step, num_tokens + step, step):
            yield self._event(min(number, num_tokens), num_tokens) + b"\0"

    def _event(self, number: int, num_tokens: int) -> bytes:
        reason = b'"length"' if number == num_tokens else b"null"
        return (
            b'{"text": "%s", "error_code": 0, "usage": {"prompt_tokens": 16, "completion_tokens": %d, '
            b'"total_tokens": %d}, "finish_reason": %s}' % (WORD * number, number, 16 + number, reason)
        )


class Upstream(asyncio.Protocol):
    """One connection: whole HTTP/1.1 requests with a Content-Length, one after another."""

    def __init__(self, answers: OurAnswers | FastChatAnswers, worker_id: str) -> None:
        self._answers = answers
        self._worker_id = worker_id
        self._received = b""
        self._transport: asyncio.Transport | None = None
        self._is_paused = False
        self._events: Iterator[bytes] | None = None
        self._period_s = 0.0
        self._next_at = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Implements `asyncio.Protocol`, as do those below."""
        self._transport = transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Whoever asked has left: nothing more is written."""
        self._transport = self._events = None

    def pause_writing(self) -> None:
        """The reader is slower than we are."""
        self._is_paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._is_paused = False
        if self._events is not None and not self._period_s:
            self._write_event()

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._received += data
        head, mark, rest = self._received.partition(b"\r\n\r\n")
        if not mark:
            return
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        if len(rest) < int(headers.get("content-length", "0")):
            return
        self._received = b""
        self._answer(lines[0].split(" ")[1], headers, json.loads(rest or b"{}"))

    def _answer(self, path: str, headers: dict[str, str], body: dict) -> None:
        if path == "/livez":
            self._send_whole(json.dumps({"worker_id": self._worker_id}).encode())
        elif body.get("stream") or path == "/worker_generate_stream":
            self._send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            self._events = self._answers.events(headers, body)
            _, _, rate = body["model"].partition("-")
            self._period_s = 1 / int(rate) if rate else 0.0
            self._next_at = asyncio.get_running_loop().time() + random.random() * self._period_s
            self._write_event()
        else:
            self._send_whole(self._answers.whole(path, headers, body))

    def _write_event(self) -> None:
        """One event in one write, and the next a moment later."""
        if self._events is None or (self._is_paused and not self._period_s):
            return
        event = next(self._events, None)
        if event is None:
            self._events = None
            self._send(b"0\r\n\r\n")
            return
        self._send(b"%x\r\n%s\r\n" % (len(event), event))
        loop = asyncio.get_running_loop()
        if self._period_s:
            self._next_at += self._period_s
            loop.call_at(self._next_at, self._write_event)
        else:
            loop.call_soon(self._write_event)

    def _send_whole(self, body: bytes) -> None:
        self._send(
            b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )

    def _send(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


async def serve(flags: argparse.Namespace) -> None:
    """Listen, register, say so, and stay until killed."""
    worker_id = "canned"
    is_ours = flags.protocol == "ours"
    answers = OurAnswers() if is_ours else FastChatAnswers(flags.tokens_per_event)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Upstream(answers, worker_id), "127.0.0.1", 0, backlog=4096)
    address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    if not is_ours:
        registration = json.dumps({"worker_name": address, "check_heart_beat": False, "worker_status": None})
        await loop.run_in_executor(None, _post, f"{flags.controller_address}/register_worker", registration.encode())
        print(address, flush=True)
        await asyncio.Event().wait()
    hello = Hello(
        worker_id=worker_id,
        address=address,
        models=tuple(ModelEntry(name=name, max_context=MAX_CONTEXT, created=0) for name in MODELS),
    )
    token = os.environ["CLUSTER_TOKEN"]
    connection = ControlConnection(controller_address=flags.controller_address, token=token, hello=hello, get_load=Load)
    async with connection.keep_open():
        print(address, flush=True)
        await asyncio.Event().wait()


def _post(url: str, body: bytes) -> None:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        answer.read()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", choices=("ours", "fastchat-0.2"))
    parser.add_argument("controller_address")
    parser.add_argument("--tokens-per-event", type=int, default=1)
    uvloop.run(serve(parser.parse_args()))
