"""Server-sent events of a chat answer, read as text, by whoever talks to a model as a client.

Events end with an empty line and may come in any pieces; lines may end with CRLF; comments are passed over.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from fastchat.errors import RequestError, UnavailableError

MAX_EVENT_BYTES = 16 * 2**20


class AnswerReader:
    """Takes the bytes of a stream and gives the text. What it has learned otherwise is in its attributes."""

    def __init__(self) -> None:
        self.answer_id: str | None = None
        self.finish_reason: str | None = None
        self.num_prompt_tokens: int | None = None
        self.num_generated_tokens: int | None = None
        self.prompt_token_ids: tuple[int, ...] = ()
        self.token_ids: list[int] = []
        self.is_done = False
        self._buffer = b""

    def __repr__(self) -> str:
        return f"<AnswerReader {self.finish_reason or 'open'} {len(self._buffer)} bytes waiting>"

    def push(self, received: bytes) -> str:
        """The text that is new. Raises the error that the stream tells of."""
        self._buffer += received
        texts = [self._read(payload) for payload in self._complete_events()]
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise UnavailableError("The server sends an event without end; is this an OpenAI-compatible server?")
        return "".join(texts)

    def _complete_events(self) -> Iterator[bytes]:
        """The `data` of each event that is whole."""
        lines: list[bytes] = []
        while (end := self._buffer.find(b"\n")) >= 0:
            line, self._buffer = self._buffer[:end].rstrip(b"\r"), self._buffer[end + 1 :]
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
            elif not line and lines:
                yield b"\n".join(lines)
                lines = []
        if lines:  # an event of which the end has not come: it waits as it was
            self._buffer = b"".join(b"data: " + line + b"\n" for line in lines) + self._buffer

    def _read(self, payload: bytes) -> str:
        if payload.strip() == b"[DONE]":
            self.is_done = True
            return ""
        try:
            chunk = json.loads(payload)
        except ValueError:
            raise UnavailableError("The server's stream is not JSON; is this an OpenAI-compatible server?") from None
        if not isinstance(chunk, dict):
            return ""
        error = error_of(chunk)
        if error is not None:
            raise error
        if isinstance(answer_id := chunk.get("id"), str):
            self.answer_id = answer_id
        self._read_usage(chunk.get("usage"))
        choices = chunk.get("choices")
        return self._read_choice(choices[0]) if isinstance(choices, list) and choices else ""

    def _read_usage(self, usage: Any) -> None:  # Any: JSON, here and below
        if isinstance(usage, dict):
            self.num_prompt_tokens = _count(usage.get("prompt_tokens"))
            self.num_generated_tokens = _count(usage.get("completion_tokens"))

    def _read_choice(self, choice: Any) -> str:
        if not isinstance(choice, dict):
            return ""
        self.prompt_token_ids = self.prompt_token_ids or tuple(choice.get("prompt_token_ids") or ())
        self.token_ids += choice.get("token_ids") or ()
        reason = choice.get("finish_reason")
        if isinstance(reason, str):
            self.finish_reason = reason
        delta = choice.get("delta")
        content = delta.get("content") if isinstance(delta, dict) else None
        return content if isinstance(content, str) else ""


def error_of(body: Any, *, status: int = 500) -> RequestError | UnavailableError | None:
    """The error in a JSON body: OpenAI's, FastChat's flat one or `detail`; None where it holds none.

    Its code decides what can be done about it; a status of the client's fault makes it a `RequestError`.
    """
    if not isinstance(body, dict):
        return None
    inner = body.get("error")
    if inner is None and body.get("object") != "error" and "detail" not in body:
        return None
    facts = (
        inner if isinstance(inner, dict) else {**body, "message": inner or body.get("message") or body.get("detail")}
    )
    message = " ".join(str(facts.get("message") or "the server gave no reason").split())
    code = facts.get("code")
    # Within a stream there is no status; the codes of a client's fault are words, as are ours.
    if 400 <= status < 500 or code == "context_length_exceeded":
        return RequestError(message, code=code if isinstance(code, str) else None)
    return UnavailableError(message, code=code if isinstance(code, str) else "unavailable")


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
