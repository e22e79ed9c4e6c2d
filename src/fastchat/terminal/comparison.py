"""A round of the arena as the terminal holds it: asks a server's models side by side, votes, learns their names.

The server keeps no conversation, so each side's own is kept here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastchat.api.answer_reader import MAX_EVENT_BYTES, error_of
from fastchat.errors import UnavailableError
from fastchat.terminal.http_connection import HttpConnection

ROUNDS_PATH = "/api/v1/arena/rounds"

Json = dict[str, Any]  # Any: JSON has any value


class AnswerColumns(Protocol):
    """Shows several answers that come at once."""

    def begin(self, headings: Sequence[str]) -> None:
        """Answers follow, one for each heading."""

    def write(self, side: int, text: str) -> None:
        """A piece of one answer."""

    def fail(self, side: int, message: str) -> None:
        """One answer will not come, or no further."""

    def finish(self, side: int) -> None:
        """One answer is whole."""

    def end(self) -> None:
        """All is over, whole or not."""


class Comparison:
    """One round. `request` is what every turn sends: models or blind, and parameters."""

    def __init__(self, connection: HttpConnection, request: Mapping[str, Any], *, system_message: str = "") -> None:
        self.is_complete = False
        """Whether all sides have answered the last turn."""
        self.can_vote = False
        self._connection = connection
        self._request = dict(request)
        self._system = [_message("system", system_message)] if system_message else []
        self._round_id: str | None = None
        self._vote_token = ""
        self._labels: list[str] = []
        self._has_failed = False
        self._asked = _Asked("", {})
        self._answers: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<Comparison {self._round_id or 'not begun'}>"

    @property
    def is_begun(self) -> bool:
        """Whether the server knows the round."""
        return self._round_id is not None

    async def ask(self, question: str, columns: AnswerColumns) -> None:
        """The next turn. Raises what the server refuses, and is as it was then; a side that fails is shown."""
        histories = {
            label: [*self._asked.messages(label), _message("assistant", self._answers[label])] for label in self._labels
        }
        await self._turn(_Asked(question, histories), columns, is_retry=False)

    async def ask_again(self, columns: AnswerColumns) -> None:
        """The last turn once more."""
        await self._turn(self._asked, columns, is_retry=True)

    async def vote(self, vote: str) -> dict[str, str]:
        """Vote on the round; returns the models' names by side."""
        body = {"vote": vote, "vote_token": self._vote_token}
        document = await self._connection.post(f"{ROUNDS_PATH}/{self._round_id}/vote", body, what="a vote")
        self.can_vote = False
        return {str(side): str(name) for side, name in document["models"].items()}

    async def _turn(self, asked: _Asked, columns: AnswerColumns, *, is_retry: bool) -> None:
        path, body = self._request_of(asked, is_retry=is_retry)
        reader = _EventReader()
        try:
            async with self._connection.stream(path, body) as pieces:
                async for piece in pieces:
                    for event in reader.push(piece):
                        if event.get("type") == "round":
                            self._begin(event, asked, columns)
                        else:
                            self._obey(event, columns)
        finally:
            columns.end()
        if not reader.is_done:
            raise UnavailableError("The connection ended in the middle of the answers.")

    def _request_of(self, asked: _Asked, *, is_retry: bool) -> tuple[str, Json]:
        if self._round_id is None:
            return ROUNDS_PATH, {**self._request, "messages": [*self._system, _message("user", asked.question)]}
        shared = {name: value for name, value in self._request.items() if name not in ("models", "blind")}
        sides = {label: asked.messages(label) for label in self._labels}
        turn = {"vote_token": self._vote_token, "retry": is_retry, "side_messages": sides}
        return f"{ROUNDS_PATH}/{self._round_id}/turns", {**shared, **turn}

    def _begin(self, event: Json, asked: _Asked, columns: AnswerColumns) -> None:
        self._labels = [side["side"] for side in event["sides"]]
        if self._round_id is None:
            self._round_id, self._vote_token = event["round_id"], event["vote_token"]
            asked = _Asked(asked.question, {label: list(self._system) for label in self._labels})
        self._asked = asked
        self._answers = dict.fromkeys(self._labels, "")
        self.is_complete, self.can_vote, self._has_failed = False, False, False
        columns.begin([side["model"] or f"model {side['side']}" for side in event["sides"]])

    def _obey(self, event: Json, columns: AnswerColumns) -> None:
        kind, side = event.get("type"), event.get("index", 0)
        if kind == "chunk":
            text = "".join(choice["delta"].get("content") or "" for choice in event["chunk"].get("choices", ()))
            if text:
                self._answers[event["side"]] += text
                columns.write(side, text)
        elif kind == "done":
            columns.finish(side)
        elif kind == "error":
            self._has_failed = True
            columns.fail(side, str(event["error"]["message"]))
        elif kind == "end":
            self.is_complete, self.can_vote = not self._has_failed, event["can_vote"]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question, and what each side has heard and said before it."""

    question: str
    histories: Mapping[str, Sequence[Json]]

    def messages(self, label: str) -> list[Json]:
        return [*self.histories[label], _message("user", self.question)]


class _EventReader:
    """Cuts bytes into events and reads their JSON. Raises the error that a stream ends with."""

    def __init__(self) -> None:
        self.is_done = False
        self._rest = b""

    def push(self, piece: bytes) -> Iterator[Json]:
        *blocks, self._rest = (self._rest + piece).replace(b"\r\n", b"\n").split(b"\n\n")
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UnavailableError("The server sends an event without end; is this a server of fastchat?")
        for block in blocks:
            lines = (line[5:] for line in block.split(b"\n") if line.startswith(b"data:"))
            data = b"\n".join(lines).strip()
            if data == b"[DONE]":
                self.is_done = True
            elif data:
                yield _parsed(data)


def _parsed(data: bytes) -> Json:
    try:
        event = json.loads(data)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise UnavailableError("The server's stream is not the arena's; is this a server of fastchat?")
    if "type" not in event and (error := error_of(event)) is not None:
        raise error
    return event


def _message(role: str, text: str) -> Json:
    return {"role": role, "content": text}
