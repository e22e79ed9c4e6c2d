"""Sends the bytes of a case and reads the answer, while eight greedy streams run beside."""

from __future__ import annotations

import http.client
import json
import select
import socket
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType

from tests.bad_input.cases import COMPLETIONS, Case, completion

NUM_STREAMS = 8
PATIENCE_S = 120.0
"""For good answers; what is refused has a limit of its own."""


@dataclass(frozen=True)
class Answer:
    """What came back, and the case that it answers."""

    case: Case
    port: int
    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @cached_property
    def document(self) -> dict:
        return json.loads(self.body)

    @property
    def error(self) -> dict:
        return self.document["error"]

    @property
    def chunks(self) -> list[dict]:
        """The chunks of a stream, which ends properly."""
        events = self.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], self.body[-300:]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def again(self, **fields: object) -> Answer:
        """The same request with other fields."""
        body = self.case.body() if callable(self.case.body) else self.case.body
        answer = send(Case("again", 200, body={**body, **fields}, path=self.case.path), self.port)
        assert answer.status == 200, answer.body
        return answer


def send(case: Case, port: int) -> Answer:
    """Send a case to a server and read the whole answer, which may come before all was sent."""
    pieces = case.pieces(f"127.0.0.1:{port}")  # what takes long to make is not the server's fault
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as connection:
        _send_until_answered(connection, pieces)
        response = http.client.HTTPResponse(connection, method=case.method)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        body = response.read()
        return Answer(case, port, response.status, headers, body, time.monotonic() - began)


def _send_until_answered(connection: socket.socket, pieces: Iterable[bytes]) -> None:
    connection.setblocking(False)
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            readable, writable, _ = select.select([connection], [connection], [], PATIENCE_S)
            if readable:
                connection.settimeout(PATIENCE_S)
                return
            assert writable, "neither read nor answered"
            try:
                rest = rest[connection.send(rest) :]
            except (BrokenPipeError, ConnectionResetError):
                break
    connection.settimeout(PATIENCE_S)


STREAMED = completion(prompt="The quick brown fox", max_tokens=48, temperature=0, ignore_eos=True)


class StreamsBeside(AbstractContextManager["StreamsBeside"]):
    """Eight greedy streams, each begun anew when it has ended. At the end each must have had `text`, always."""

    def __init__(self, port: int, text: str) -> None:
        self._port = port
        self._text = text
        self._is_over = threading.Event()
        self._wrong: list[str] = []
        self._num_streams = 0
        self._threads = [threading.Thread(target=self._stream) for _ in range(NUM_STREAMS)]

    def __enter__(self) -> StreamsBeside:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(120)
        if error is None:
            assert not self._wrong, self._wrong[0]
            assert self._num_streams >= NUM_STREAMS

    def _stream(self) -> None:
        while not self._wrong:
            try:
                answer = send(Case("beside", 200, body={**STREAMED, "stream": True}, path=COMPLETIONS), self._port)
                text = "".join(chunk["choices"][0]["text"] for chunk in answer.chunks)
                problem = None if text == self._text else f"{text!r} is not {self._text!r}"
            except Exception as failure:  # noqa: BLE001 - whatever it is, the test that waits for it must fail
                problem = repr(failure)
            if problem is not None:
                self._wrong.append(problem)
            self._num_streams += 1
            if self._is_over.is_set():
                return
