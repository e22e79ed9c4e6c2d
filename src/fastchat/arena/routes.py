"""The arena's routes: compare models, vote, read the scores. Mounted in the API server by its command.

POST /api/v1/arena/rounds                    begin a round: the sides' answers as one stream
POST /api/v1/arena/rounds/{round_id}/turns   its next turn, or the last one again, with the same models
POST /api/v1/arena/rounds/{round_id}/vote    a, b, tie or both_bad; answers with the names
POST /api/v1/feedback                        up, down or flag for one answer of a chat
GET  /api/v1/leaderboard                     scores, intervals, win matrix, counts
GET  /api/v1/arena/votes.jsonl               all votes and feedback of who asks
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fastchat.api.http_edge import EventStreamResponse, read_json_object
from fastchat.api.json_body import BodyLimits
from fastchat.api.parameters import validate
from fastchat.arena.chat_models import ChatModels, draw
from fastchat.arena.database import Database
from fastchat.arena.language import language_of
from fastchat.arena.leaderboard import Leaderboards
from fastchat.arena.leaderboard_query import NAMES, parse_vote_filter
from fastchat.arena.records import SCHEMA, ArenaRecords, FinishedSide, RoundKey, RoundState
from fastchat.arena.round_request import (
    LABELS,
    NUM_BLIND_SIDES,
    ArenaRoundRequest,
    ArenaTurnRequest,
    ArenaVoteRequest,
    AskedTurn,
    FeedbackRequest,
    asked_turn,
    parse_round,
    parse_turn,
)
from fastchat.arena.round_stream import RoundStream, Side, framed
from fastchat.arena.vote_log import VoteLog
from fastchat.cluster.contract import IGNORED_HEADER
from fastchat.errors import UnavailableError

MAX_OPEN_TURNS = 256
"""Turns that are answered at the same time."""
_SMALL_BODY = BodyLimits(max_bytes=16 * 1024)

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class ArenaConfig:
    """Where votes are kept, and whether the conversations are kept with them."""

    path: Path
    logs_text: bool = False


@dataclass(frozen=True, slots=True)
class ArenaRoute:
    """One route, and what a document of the API says of it."""

    method: str
    path: str
    summary: str
    endpoint: Endpoint
    body: type[BaseModel] | None = None
    can_stream: bool = False
    query: tuple[str, ...] = ()
    answer_type: str = "application/json"


class Arena:
    """The endpoints and what they share. Made outside of an event loop; lives within `keep_open`."""

    _chat: ChatModels
    _records: ArenaRecords
    _votes: VoteLog
    _leaderboards: Leaderboards

    def __init__(self, config: ArenaConfig) -> None:
        self._config = config
        self._open_turns: set[RoundStream] = set()

    def __repr__(self) -> str:
        return f"<Arena open_turns={len(self._open_turns)}>"

    def routes(self) -> tuple[ArenaRoute, ...]:
        """What is to be mounted."""
        rounds = "/api/v1/arena/rounds"
        return (
            ArenaRoute("POST", rounds, "Begin a round", self._begin_round, ArenaRoundRequest, can_stream=True),
            ArenaRoute(
                "POST", f"{rounds}/{{round_id}}/turns", "Go on with it", self._go_on, ArenaTurnRequest, can_stream=True
            ),
            ArenaRoute("POST", f"{rounds}/{{round_id}}/vote", "Vote on a round", self._vote, ArenaVoteRequest),
            ArenaRoute("POST", "/api/v1/feedback", "Judge one answer", self._feedback, FeedbackRequest),
            ArenaRoute("GET", "/api/v1/leaderboard", "Scores of the models", self._leaderboard, query=NAMES),
            ArenaRoute(
                "GET",
                "/api/v1/arena/votes.jsonl",
                "Votes as JSON lines",
                self._export,
                answer_type="application/x-ndjson",
            ),
        )

    @asynccontextmanager
    async def keep_open(self, chat: ChatModels) -> AsyncIterator[None]:
        """While the block runs, the routes answer with the models of `chat`."""
        writer = Database(self._config.path, SCHEMA, writes=True)
        reader = Database(self._config.path, SCHEMA, writes=False)
        await writer.open()
        if writer.is_open:  # else the reason is logged already
            await reader.open()
        self._chat = chat
        self._records = ArenaRecords(writer, logs_text=self._config.logs_text)
        self._votes = VoteLog(reader)
        self._leaderboards = Leaderboards(self._votes)
        try:
            yield
        finally:
            await reader.close()
            await writer.close()

    async def _begin_round(self, request: Request) -> Response:
        document = await read_json_object(request)
        body, is_blind = parse_round(document)
        named = body.models or []
        asked = asked_turn(document, num_sides=NUM_BLIND_SIDES if is_blind else len(named), is_blind=is_blind)
        for model in named:
            self._chat.check_served(model)
        models = draw(named or self._chat.distinct_models(), NUM_BLIND_SIDES) if is_blind else named
        self._check_room()
        state, token = await self._records.begin_round(models, is_blind=is_blind, tenant=self._chat.tenant_of(request))
        return self._answer(request, state, asked, vote_token=token)

    async def _go_on(self, request: Request) -> Response:
        document = await read_json_object(request)
        body = parse_turn(document)
        key = RoundKey(request.path_params["round_id"], body.vote_token, self._chat.tenant_of(request))
        found = await self._records.find_round(key)
        asked = asked_turn(document, num_sides=len(found.models), is_blind=found.is_blind)
        self._check_room()
        state = await self._records.begin_turn(key, is_retry=bool(body.retry))
        return self._answer(request, state, asked, vote_token=None)

    async def _vote(self, request: Request) -> Response:
        body = validate(ArenaVoteRequest, await read_json_object(request, _SMALL_BODY))
        key = RoundKey(request.path_params["round_id"], body.vote_token, self._chat.tenant_of(request))
        state = await self._records.vote(key, body.vote)
        names = dict(zip(LABELS, state.models, strict=False))
        return _json({"object": "arena.vote", "round_id": state.round_id, "vote": body.vote, "models": names})

    async def _feedback(self, request: Request) -> Response:
        body = validate(FeedbackRequest, await read_json_object(request, _SMALL_BODY))
        self._chat.check_served(body.model)
        tenant = self._chat.tenant_of(request)
        is_new = await self._records.add_feedback(body.id, body.model, body.vote, tenant=tenant)
        answer = {"object": "feedback", "id": body.id, "model": body.model, "vote": body.vote, "is_new": is_new}
        return _json(answer)

    async def _leaderboard(self, request: Request) -> Response:
        wanted = parse_vote_filter(request.query_params.multi_items())
        return Response(await self._leaderboards.document(wanted), media_type="application/json")

    async def _export(self, request: Request) -> Response:
        lines = await self._votes.export(tenant=self._chat.tenant_of(request))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def _check_room(self) -> None:
        if len(self._open_turns) >= MAX_OPEN_TURNS:
            raise UnavailableError("Too many rounds are answered now; try again in a moment.", code="arena_busy")

    def _answer(self, request: Request, state: RoundState, asked: AskedTurn, *, vote_token: str | None) -> Response:
        """The stream of one turn."""
        sides = [Side(index, model, is_blind=state.is_blind) for index, model in enumerate(state.models)]
        shown = [{**side.tag(), "model": None if state.is_blind else side.model} for side in sides]
        opening = {"round_id": state.round_id, "turn": state.turn, "attempt": state.attempt, "blind": state.is_blind}
        if vote_token is not None:
            opening["vote_token"] = vote_token

        async def complete(finished: Sequence[FinishedSide]) -> bool:
            return await self._records.finish_turn(state, finished, language_of(asked.user_texts()))

        stream = RoundStream(
            framed("round", {**opening, "sides": shown}),
            sides,
            asked,
            self._chat,
            tenant=self._chat.tenant_of(request),
            is_blind=state.is_blind,
            on_complete=complete,
            open_turns=self._open_turns,
        )
        ignored = asked.ignored.header_value()
        return EventStreamResponse(stream, {IGNORED_HEADER: ignored} if ignored else None)


def _json(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
