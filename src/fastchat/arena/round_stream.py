"""The sides of one turn, asked at once and read as one stream of framed events.

    event: round   what is asked: round id, turn, sides; a new round's vote token
    event: chunk   one chunk of one side, in its own shape; blind: without name, ids and fingerprint
    event: done    one side ended well
    event: error   one side failed; the others go on
    event: end     all sides have ended; whether the round can be voted on now

Every event's `data` is a JSON object with its `type`, and after the last one comes `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson
import structlog

from fastchat.api.http_edge import error_body
from fastchat.api.streaming import DONE_EVENT
from fastchat.arena.chat_models import ChatModels
from fastchat.arena.records import FinishedSide
from fastchat.arena.round_request import LABELS, AskedTurn
from fastchat.errors import EngineError, FastChatError, UnavailableError

MAX_WAITING_PIECES = 64
"""A side that is this far ahead of its reader waits."""

Json = dict[str, Any]  # Any: JSON
_SHOWN_REASONS = frozenset({"stop", "length", "content_filter", "tool_calls"})
_SHOWN_DELTA = ("role", "content", "reasoning_content")
_TOO_LONG = {
    "message": "The conversation and the answer asked for are too long for this model; begin a new round.",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
_FAILED = {
    "message": "This side failed; retry the turn.",
    "type": "server_error",
    "param": None,
    "code": "unavailable",
}

_log = structlog.stdlib.get_logger(__name__)


def framed(kind: str, document: Mapping[str, Any]) -> bytes:
    """One event of a round."""
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **document}) + b"\n\n"


class Side:
    """One model's part of a turn: reads its events, keeps what is to be remembered of it."""

    def __init__(self, index: int, model: str, *, is_blind: bool) -> None:
        self.index = index
        self.label = LABELS[index]
        self.model = model
        self.is_finished = False
        self._is_blind = is_blind
        self.has_failed = False
        self._texts: list[str] = []
        self._finish_reason: str | None = None
        self._began_at = time.monotonic()
        self._first_text_at: float | None = None
        self._ended_at: float | None = None

    def __repr__(self) -> str:
        condition = "failed" if self.has_failed else "finished" if self.is_finished else "open"
        return f"<Side {self.label} {condition}>"

    def tag(self) -> Json:
        """Which side an event belongs to."""
        return {"side": self.label, "index": self.index}

    def read(self, events: bytes) -> bytes:
        """Events of the model as events of the round."""
        return b"".join(self._read_one(data) for data in _datas(events))

    def check_ended(self) -> None:
        """Raise `UnavailableError` where the events ended and the side did not."""
        if not self.has_failed and not self.is_finished:
            raise _malformed()

    def fail(self, error: Mapping[str, Any]) -> bytes:
        """The side's last event, an error. A blind one says nothing that tells the model."""
        self.has_failed = True
        if self._is_blind:
            error = _TOO_LONG if error.get("code") == "context_length_exceeded" else _FAILED
        return framed("error", {**self.tag(), "error": error})

    def finished(self, messages: Sequence[Json]) -> FinishedSide:
        """What is remembered of a side that ended well."""
        first, ended = self._first_text_at, self._ended_at
        assert ended is not None
        return FinishedSide(
            self.label,
            messages,
            "".join(self._texts),
            self._finish_reason,
            duration_s=ended - self._began_at,
            time_to_first_text_s=None if first is None else first - self._began_at,
        )

    def _read_one(self, data: bytes) -> bytes:
        if self.has_failed or self.is_finished:
            return b""
        if data == b"[DONE]":
            self.is_finished = True
            self._ended_at = time.monotonic()
            return framed("done", {**self.tag(), "finish_reason": self._finish_reason})
        chunk = _parsed(data)
        error = chunk.get("error")
        if isinstance(error, dict):
            return self.fail(error)
        choices = [choice for choice in chunk.get("choices") or [] if isinstance(choice, dict)]
        if self._is_blind:
            choices = [_without_name(choice) for choice in choices]
        for choice in choices:
            self._note(choice)
        if self._is_blind:
            if not choices:
                return b""
            chunk = {"object": "chat.completion.chunk", "choices": choices}
        return framed("chunk", {**self.tag(), "chunk": chunk})

    def _note(self, choice: Json) -> None:
        reason, delta = choice.get("finish_reason"), choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        self._finish_reason = reason if isinstance(reason, str) else self._finish_reason
        if isinstance(content, str) and content:
            self._first_text_at = self._first_text_at or time.monotonic()
            self._texts.append(content)


class RoundStream:
    """The body of a turn's answer. `on_complete` is told once of sides that all ended well, and says whether it counts.

    `open_turns` holds it while it runs. Closing it, by whatever way, ends what still runs on the workers.
    """

    def __init__(
        self,
        opening: bytes,
        sides: Sequence[Side],
        asked: AskedTurn,
        chat: ChatModels,
        *,
        tenant: str,
        is_blind: bool,
        on_complete: Callable[[Sequence[FinishedSide]], Awaitable[bool]],
        open_turns: set[RoundStream],
    ) -> None:
        self._opening: bytes | None = opening
        self._sides = sides
        self._asked = asked
        self._chat = chat
        self._tenant = tenant
        self._is_blind = is_blind
        self._on_complete = on_complete
        self._open_turns = open_turns
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_WAITING_PIECES)
        self._tasks: list[asyncio.Task[None]] = []
        self._num_open = len(sides)
        self._has_ended = False

    def __aiter__(self) -> RoundStream:
        return self

    async def __anext__(self) -> bytes:
        if self._opening is not None:
            opening, self._opening = self._opening, None
            self._open_turns.add(self)
            loop = asyncio.get_running_loop()
            self._tasks = [loop.create_task(self._answer(side)) for side in self._sides]
            return opening
        pieces: list[bytes] = []
        while self._num_open and not (pieces and self._pieces.empty()):
            piece = await self._pieces.get()
            if piece is None:
                self._num_open -= 1
            else:
                pieces.append(piece)
        if pieces:
            return b"".join(pieces)
        if self._has_ended:
            raise StopAsyncIteration
        self._has_ended = True
        return await self._end()

    async def aclose(self) -> None:
        """Cancel what still runs and wait until its workers are told."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._open_turns.discard(self)

    async def _end(self) -> bytes:
        can_vote, error = False, None
        if all(side.is_finished for side in self._sides):
            finished = [side.finished(self._asked.conversations[side.index]) for side in self._sides]
            try:
                can_vote = await self._on_complete(finished) and len(self._sides) == 2
            except UnavailableError as failure:  # the answers are there; only the round is lost
                error = _error_of(failure)
        return framed("end", {"can_vote": can_vote, "error": error}) + DONE_EVENT

    async def _answer(self, side: Side) -> None:
        """One side from its beginning to its end; the reader always gets its last piece, then None."""
        try:
            document = self._asked.document(side.index, side.model)
            stream = await self._chat.open_chat(document, tenant=self._tenant, is_secret=self._is_blind)
            async with aclosing(stream):
                async for events in stream:
                    if piece := side.read(events):
                        await self._pieces.put(piece)
                    if side.has_failed:
                        break
            side.check_ended()
        except FastChatError as error:
            await self._pieces.put(side.fail(_error_of(error)))
        except Exception:  # noqa: BLE001 - the top of a side: whatever it is, its reader is told and the other side goes on
            _log.exception("a side of a round failed unexpectedly")
            await self._pieces.put(side.fail(_error_of(EngineError("unexpected"))))
        await self._pieces.put(None)


def _datas(events: bytes) -> list[bytes]:
    """The `data` of each event; comments and other fields are passed over."""
    blocks = events.replace(b"\r\n", b"\n").split(b"\n\n")
    datas = (
        b"\n".join(line[5:].removeprefix(b" ") for line in block.split(b"\n") if line.startswith(b"data:"))
        for block in blocks
    )
    return [data for data in datas if data]


def _parsed(data: bytes) -> Json:
    try:
        chunk = orjson.loads(data)
    except orjson.JSONDecodeError:
        raise _malformed() from None
    if not isinstance(chunk, dict):
        raise _malformed()
    return chunk


def _malformed() -> UnavailableError:
    return UnavailableError("The worker's answer was incomplete or malformed; try again.", code="bad_worker_answer")


def _without_name(choice: Json) -> Json:
    """A choice with what the reader needs and nothing that tells the model or its server."""
    delta, reason = choice.get("delta"), choice.get("finish_reason")
    shown = {name: delta[name] for name in _SHOWN_DELTA if name in delta} if isinstance(delta, dict) else {}
    return {
        "index": 0,
        "delta": shown,
        "finish_reason": reason if reason is None or reason in _SHOWN_REASONS else "stop",
    }


def _error_of(error: FastChatError) -> Json:
    body: Json = orjson.loads(error_body(error)[1])["error"]
    return body
