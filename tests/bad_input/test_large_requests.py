"""What is large and allowed, or large and refused late, holds up nobody: life signs of both processes go on."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import suppress

import aiohttp
import psutil
import pytest

from tests.bad_input.cases import CHAT, COMPLETIONS, EMBEDDINGS, MODEL, TOKENIZE, Case, chat, completion, embedding
from tests.bad_input.http_rows import chunked, endless
from tests.bad_input.sending import StreamsBeside, send
from tests.processes import ServerProcess

LAG_LIMIT_S = 1.5
"""Of one life sign. Alone on two cores the longest was 0.1 s."""
MIB = 2**20


def life_sign_s(process: ServerProcess) -> float:
    """How long a life sign took, or how long the process computed meanwhile where that is less.

    A machine that stalls makes anybody late; what a request did to the event loop is computed by the process.
    """
    before = computed_s(process)
    seconds = send(Case("life", 200, path="/livez", method="GET"), process.port).seconds
    return min(seconds, computed_s(process) - before)


def computed_s(process: ServerProcess) -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def with_list(values: str) -> bytes:
    return f'{{"model":"{MODEL}","prompt":"x","max_tokens":1,"a":[{values}1]}}'.encode()


LARGE = {
    "a prompt of 4 MB": (COMPLETIONS, 400, lambda: completion(prompt="word " * 800_000)),
    "400,000 token ids": (COMPLETIONS, 400, lambda: completion(prompt=[7] * 400_000)),
    "2,048 messages of 1,500 characters": (
        CHAT,
        400,
        lambda: chat(messages=[{"role": "user", "content": "word " * 300}] * 2048),
    ),
    "30,000 parts": (
        CHAT,
        400,
        lambda: chat(messages=[{"role": "user", "content": [{"type": "text", "text": "x"}] * 30_000}]),
    ),
    "499,000 numbers": (COMPLETIONS, 200, lambda: with_list("1," * 499_000)),
    "32,000 objects": (COMPLETIONS, 200, lambda: with_list('{"a":1},' * 32_000)),
    "131,000 strings": (COMPLETIONS, 200, lambda: with_list('"abcdefgh",' * 131_000)),
    "a million lists": (COMPLETIONS, 400, lambda: with_list("[]," * 1_000_000)),
    "130,000 stop strings that look like patterns": (COMPLETIONS, 400, lambda: completion(stop=["(a+)+$"] * 130_000)),
    "400,000 stop ids": (COMPLETIONS, 400, lambda: completion(stop_token_ids=[5] * 400_000)),
    "120,000 biases": (COMPLETIONS, 400, lambda: completion(logit_bias={str(number): 1 for number in range(120_000)})),
    "2,048 inputs that are too long together with one": (
        EMBEDDINGS,
        400,
        lambda: embedding(input=["word " * 390] * 2000 + ["word " * 3000]),
    ),
    "text of 1 MB to tokenize": (TOKENIZE, 200, lambda: {"model": MODEL, "prompt": "word " * 200_000}),
    "400,000 ids to detokenize": ("/detokenize", 200, lambda: {"model": MODEL, "tokens": [100] * 400_000}),
}


@pytest.mark.parametrize("name", LARGE)
def test_a_large_request_does_not_hold_the_event_loops(target, name):
    """API server and worker answer life signs while one of them reads, tokenizes and refuses."""
    path, status, make = LARGE[name]
    body = make()
    case = Case(
        name,
        status,
        body=body if isinstance(body, bytes) else json.dumps(body, separators=(",", ":")).encode(),
        path=path,
    )
    is_over = threading.Event()
    lags: list[float] = []

    def watch(process: ServerProcess) -> None:
        while not is_over.is_set():
            lags.append(life_sign_s(process))
            time.sleep(0.005)

    watchers = [threading.Thread(target=watch, args=(each,)) for each in (target.system.api, target.system.worker)]
    for watcher in watchers:
        watcher.start()
    try:
        answer = send(case, target.port)
    finally:
        is_over.set()
        for watcher in watchers:
            watcher.join()
    assert answer.status == status, answer.body[:300]
    assert max(lags) < LAG_LIMIT_S, (name, max(lags))


def test_two_hundred_trickling_senders_are_cut_and_delay_nobody(target):
    """A byte a second for ever: closed at the deadline of the head, and others are answered meanwhile."""
    address = ("127.0.0.1", target.port)
    senders = [socket.create_connection(address, timeout=30) for _ in range(200)]
    is_over = threading.Event()

    def trickle() -> None:
        while not is_over.wait(1.0):
            for sender in senders:
                with suppress(OSError):  # cut, as it should be
                    sender.send(b"x")

    feeder = threading.Thread(target=trickle)
    try:
        for sender in senders:
            sender.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\nA: ")
        began = time.monotonic()
        feeder.start()
        slowest = 0.0
        while time.monotonic() - began < 9:
            slowest = max(slowest, life_sign_s(target.system.api))
            time.sleep(0.05)
        assert slowest < LAG_LIMIT_S
        answers = [sender.recv(65536) for sender in senders]
        assert time.monotonic() - began < 30
        assert all(answer.startswith(b"HTTP/1.1 408 ") and b'"code":"head_timeout"' in answer for answer in answers)
    finally:
        is_over.set()
        feeder.join()
        for sender in senders:
            sender.close()


def test_ten_thousand_requests_on_one_connection_are_answered_in_order_and_others_meanwhile(target):
    """P12: pipelined, as much as the server lets in."""
    one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    rest, received = memoryview(one * 9_999 + last), bytearray()
    slowest = 0.0
    with socket.create_connection(("127.0.0.1", target.port)) as connection:
        connection.settimeout(0.05)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with suppress(TimeoutError):  # it reads no more before we have read
                if rest:
                    rest = rest[connection.send(rest) :]
            try:
                chunk = connection.recv(65536)
            except TimeoutError:
                continue
            if not chunk:
                break
            received += chunk
            if len(received) % 7 == 0:
                slowest = max(slowest, life_sign_s(target.system.api))
    assert received.count(b"HTTP/1.1 200 ") == 10_000
    assert received.endswith(b"}")
    assert b'"version"' in received[-200:]
    assert slowest < 4 * LAG_LIMIT_S


def test_equal_prompts_at_once_are_answered_alike(target):
    """P43: hundreds at once, with greedy streams beside; each gets the text that it gets alone."""
    body = completion(prompt="The same long prompt. " * 100, max_tokens=1, temperature=0)
    alone = send(Case("alone", 200, body=body, path=COMPLETIONS), target.port).document

    async def ask_all() -> list[dict]:
        url = f"http://127.0.0.1:{target.port}{COMPLETIONS}"
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask() -> dict:
                async with session.post(url, json=body) as response:
                    assert response.status == 200
                    return await response.json()

            return await asyncio.gather(*(ask() for _ in range(300)))

    with StreamsBeside(target.port, target.streamed_text):
        documents = asyncio.run(ask_all())
    assert {document["choices"][0]["text"] for document in documents} == {alone["choices"][0]["text"]}
    computed = sum(
        document["usage"]["prompt_tokens"] - document["usage"]["prompt_tokens_details"]["cached_tokens"]
        for document in documents
    )
    total = sum(document["usage"]["prompt_tokens"] for document in documents)
    assert computed < total / 2, "most blocks of most prompts were there already"


def test_a_body_without_end_takes_no_memory(target):
    """P02: of ten gigabytes no more is held than may be sent."""
    process = psutil.Process(target.system.api.pid)
    case = Case("10 GB", 413, raw=lambda host: chunked(CHAT, host, endless()))
    send(case, target.port)
    before = process.memory_info().rss
    for _ in range(10):
        assert send(case, target.port).status == 413
    assert process.memory_info().rss - before < 8 * MIB
