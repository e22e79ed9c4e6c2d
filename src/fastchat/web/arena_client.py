"""Rounds, votes and the leaderboard, asked of the API server."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastchat.api.answer_reader import MAX_EVENT_BYTES
from fastchat.errors import FastChatError, UnavailableError
from fastchat.web.api_client import ApiClient, Message, as_messages

SIDES = ("a", "b")


@dataclass(slots=True)
class Round:
    """One round as a browser's session holds it. The token is what may vote and go on; a blind one names no models."""

    models: tuple[str, ...] = ()
    round_id: str = ""
    vote_token: str = field(default="", repr=False)
    can_vote: bool = False
    is_over: bool = False


@dataclass(slots=True)
class Side:
    """What has come of one side's answer."""

    text: str = ""
    error: FastChatError | None = None
    finish_reason: str | None = None


async def read_turn(client: ApiClient, path: str, body: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The events of one turn, each a JSON object with its `type`. Closing the generator ends both answers."""
    buffer = b""
    async for received in client.stream_bytes(path, body):
        buffer += received
        if len(buffer) > MAX_EVENT_BYTES:
            raise UnavailableError("The server sends an event without end.")
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            payload = b"".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:")).strip()
            if payload == b"[DONE]":
                return
            if payload:
                yield _json_object(payload)
    raise UnavailableError("The answers ended before they were complete.", code="stream_lost")


async def vote(client: ApiClient, the_round: Round, choice: str) -> dict[str, str]:
    """Vote once; the models' names by side."""
    body = {"vote": choice, "vote_token": the_round.vote_token}
    answer = await client.post_json(f"/api/v1/arena/rounds/{the_round.round_id}/vote", body)
    return {str(side): str(name) for side, name in answer["models"].items()}


def turn_body(
    sides: Mapping[str, list[Message]], options: Mapping[str, Any], *, system: str
) -> dict[str, Any]:  # Any: JSON
    """The body of a turn: each side has its own conversation."""
    messages = {
        side: [{"role": message.role, "content": message.text} for message in as_messages(system, turns)]
        for side, turns in sides.items()
    }
    return {"side_messages": messages, **{name: value for name, value in options.items() if value is not None}}


def _json_object(payload: bytes) -> dict[str, Any]:
    try:
        event = json.loads(payload)
    except ValueError:
        event = None
    if not isinstance(event, dict):
        raise UnavailableError("The server's stream is not JSON.")
    return event
