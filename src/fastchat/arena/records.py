"""What the arena keeps: rounds, votes and feedback, and texts only where the operator asked for them.

    rounds    one row each: models by side, blind or not, turn and attempt, whether the last turn is complete
    votes     one row for each voted round, never changed: what the leaderboard is made of
    feedback  one row for each answer of a chat that somebody judged
    texts     conversations and answers, empty without `logs_text`

Without texts a side is remembered by its length, its time and a digest that only this file's own secret can make, so
that equal answers can be told and short ones cannot be guessed. A round that nobody votes on is forgotten.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastchat.arena.database import Database
from fastchat.arena.language import Language
from fastchat.errors import ConflictError, PermissionDeniedError, RecordNotFoundError

MAX_TURNS = 100
MAX_UNVOTED_ROUNDS = 100_000
UNVOTED_LIFETIME_S = 7 * 24 * 3600.0
_PRUNE_EVERY = 256
_PRUNE_EVERY_S = 3600.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS rounds (
    round_id TEXT PRIMARY KEY, token_digest BLOB NOT NULL, tenant TEXT NOT NULL, created_at REAL NOT NULL,
    models TEXT NOT NULL, is_blind INTEGER NOT NULL, turn INTEGER NOT NULL, attempt INTEGER NOT NULL,
    is_complete INTEGER NOT NULL, is_voted INTEGER NOT NULL, language TEXT NOT NULL, sides TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS unvoted_rounds ON rounds (created_at) WHERE is_voted = 0;
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT, round_id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL,
    voted_at REAL NOT NULL, model_a TEXT NOT NULL, model_b TEXT NOT NULL, vote TEXT NOT NULL,
    is_blind INTEGER NOT NULL, language TEXT NOT NULL, num_turns INTEGER NOT NULL, sides TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS feedback (
    number INTEGER PRIMARY KEY AUTOINCREMENT, answer_id TEXT NOT NULL, tenant TEXT NOT NULL,
    voted_at REAL NOT NULL, model TEXT NOT NULL, vote TEXT NOT NULL, UNIQUE (tenant, answer_id)
);
CREATE TABLE IF NOT EXISTS texts (
    round_id TEXT NOT NULL, turn INTEGER NOT NULL, attempt INTEGER NOT NULL, side TEXT NOT NULL,
    written_at REAL NOT NULL, messages TEXT NOT NULL, answer TEXT NOT NULL,
    PRIMARY KEY (round_id, turn, attempt, side)
);
CREATE TABLE IF NOT EXISTS secrets (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
INSERT OR IGNORE INTO secrets VALUES ('digest', randomblob(32));
"""


@dataclass(frozen=True, slots=True)
class RoundKey:
    """What opens a round: its id, its vote token, and the tenant that began it."""

    round_id: str
    vote_token: str = field(repr=False)
    tenant: str


@dataclass(frozen=True, slots=True)
class RoundState:
    """A round as a turn finds it. `models` are in the order of the sides."""

    round_id: str
    models: tuple[str, ...]
    is_blind: bool
    turn: int
    attempt: int


@dataclass(frozen=True, slots=True)
class FinishedSide:
    """One side of a turn that ended well; its texts are kept only where the operator asked for it."""

    label: str
    messages: Sequence[dict[str, Any]]  # Any: JSON
    answer: str
    finish_reason: str | None
    duration_s: float
    time_to_first_text_s: float | None


class ArenaRecords:
    """The tables of `database`. `clock` gives seconds since 1970."""

    def __init__(self, database: Database, *, logs_text: bool, clock: Callable[[], float] = time.time) -> None:
        self._database = database
        self._logs_text = logs_text
        self._clock = clock
        self._num_begun = 0
        self._pruned_at = float("-inf")

    async def begin_round(self, models: Sequence[str], *, is_blind: bool, tenant: str) -> tuple[RoundState, str]:
        """A new round and its vote token, of which only a digest is kept."""
        state = RoundState(f"round-{secrets.token_urlsafe(18)}", tuple(models), is_blind, turn=1, attempt=1)
        token = secrets.token_urlsafe(24)
        now = self._clock()
        row = (state.round_id, _token_digest(token), tenant, now, json.dumps(models), is_blind)
        prunes = self._num_begun % _PRUNE_EVERY == 0 or now - self._pruned_at >= _PRUNE_EVERY_S
        self._num_begun += 1
        self._pruned_at = now if prunes else self._pruned_at

        def work(connection: sqlite3.Connection) -> None:
            if prunes:
                _prune(connection, now)
            connection.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, 1, 1, 0, 0, 'other', '[]')", row)

        await self._database.run(work)
        return state, token

    async def find_round(self, key: RoundKey) -> RoundState:
        """A round as it stands. Raises `RecordNotFoundError` or `PermissionDeniedError`."""
        return await self._database.run(lambda connection: _state(_round_row(connection, key)))

    async def begin_turn(self, key: RoundKey, *, is_retry: bool) -> RoundState:
        """The next turn of a round, or its last one again; what an older attempt still writes counts no more.

        Raises `RecordNotFoundError`, `PermissionDeniedError` or `ConflictError`.
        """

        def work(connection: sqlite3.Connection) -> RoundState:
            row = _round_row(connection, key)
            if row["is_voted"]:
                raise ConflictError("This round has been voted on; begin a new one.", code="already_voted")
            if not is_retry and not row["is_complete"]:
                raise ConflictError(
                    "The last turn of this round is not complete; wait for it, or send `retry`: true.",
                    code="turn_not_complete",
                )
            turn, attempt = (row["turn"], row["attempt"] + 1) if is_retry else (row["turn"] + 1, 1)
            if turn > MAX_TURNS or attempt > MAX_TURNS:
                raise ConflictError(f"A round has at most {MAX_TURNS} turns; begin a new one.", code="too_many_turns")
            connection.execute(
                "UPDATE rounds SET turn = ?, attempt = ?, is_complete = 0 WHERE round_id = ?",
                (turn, attempt, key.round_id),
            )
            return replace(_state(row), turn=turn, attempt=attempt)

        return await self._database.run(work)

    async def finish_turn(self, state: RoundState, sides: Sequence[FinishedSide], language: Language) -> bool:
        """Note that all sides of the turn ended well; False where a newer attempt has begun meanwhile."""
        key = (state.round_id, state.turn, state.attempt)

        def work(connection: sqlite3.Connection) -> bool:
            secret = connection.execute("SELECT value FROM secrets WHERE name = 'digest'").fetchone()[0]
            facts = json.dumps([_facts(side, secret) for side in sides])
            changed = connection.execute(
                "UPDATE rounds SET is_complete = 1, language = ?, sides = ?"
                " WHERE round_id = ? AND turn = ? AND attempt = ? AND is_voted = 0",
                (language, facts, *key),
            ).rowcount
            if changed and self._logs_text:
                rows = [(*key, side.label, self._clock(), _json(side.messages), side.answer) for side in sides]
                connection.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
            return bool(changed)

        return await self._database.run(work)

    async def vote(self, key: RoundKey, vote: str) -> RoundState:
        """Keep the one vote of a round; returns the round, models and all.

        Raises `RecordNotFoundError`, `PermissionDeniedError` or `ConflictError`.
        """

        def work(connection: sqlite3.Connection) -> RoundState:
            row = _round_row(connection, key)
            state = _state(row)
            if row["is_voted"]:
                raise ConflictError("This round has been voted on already; a vote is final.", code="already_voted")
            if len(state.models) != 2:
                raise ConflictError("Only a round of two models can be voted on.", code="not_a_pair")
            if not row["is_complete"]:
                raise ConflictError(
                    "Both sides must have finished before the vote; where one failed or was stopped, retry the turn.",
                    code="turn_not_complete",
                )
            connection.execute("UPDATE rounds SET is_voted = 1 WHERE round_id = ?", (key.round_id,))
            kept = (row["is_blind"], row["language"], row["turn"], row["sides"])
            connection.execute(
                "INSERT INTO votes VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (key.round_id, key.tenant, self._clock(), *state.models, vote, *kept),
            )
            return state

        return await self._database.run(work)

    async def add_feedback(self, answer_id: str, model: str, vote: str, *, tenant: str) -> bool:
        """Keep what somebody thinks of an answer; False where the same was said before.

        Raises `ConflictError` where something else was said.
        """

        def work(connection: sqlite3.Connection) -> bool:
            key = (answer_id, tenant)
            known = connection.execute(
                "SELECT model, vote FROM feedback WHERE answer_id = ? AND tenant = ?", key
            ).fetchone()
            if known is None:
                row = (*key, self._clock(), model, vote)
                connection.execute("INSERT INTO feedback VALUES (NULL, ?, ?, ?, ?, ?)", row)
            elif tuple(known) != (model, vote):
                raise ConflictError("This answer has been judged already; a vote is final.", code="already_voted")
            return known is None

        return await self._database.run(work)


def _round_row(connection: sqlite3.Connection, key: RoundKey) -> sqlite3.Row:
    cursor = connection.cursor()
    cursor.row_factory = sqlite3.Row
    found = (key.round_id, key.tenant)
    row = cursor.execute("SELECT * FROM rounds WHERE round_id = ? AND tenant = ?", found).fetchone()
    if row is None:
        raise RecordNotFoundError("There is no such round, or it was forgotten.", code="round_not_found")
    if not hmac.compare_digest(row["token_digest"], _token_digest(key.vote_token)):
        raise PermissionDeniedError("The vote token is not this round's; send the one of its first event.")
    assert isinstance(row, sqlite3.Row)
    return row


def _state(row: sqlite3.Row) -> RoundState:
    models = tuple(json.loads(row["models"]))
    return RoundState(row["round_id"], models, bool(row["is_blind"]), row["turn"], row["attempt"])


def _prune(connection: sqlite3.Connection, now: float) -> None:
    """Forget rounds that nobody voted on: the old ones, and the oldest beyond a number."""
    connection.execute("DELETE FROM rounds WHERE is_voted = 0 AND created_at < ?", (now - UNVOTED_LIFETIME_S,))
    connection.execute(
        "DELETE FROM rounds WHERE round_id IN"
        " (SELECT round_id FROM rounds WHERE is_voted = 0 ORDER BY created_at DESC LIMIT -1 OFFSET ?)",
        (MAX_UNVOTED_ROUNDS,),
    )
    connection.execute("DELETE FROM texts WHERE round_id NOT IN (SELECT round_id FROM rounds)")


def _facts(side: FinishedSide, secret: bytes) -> dict[str, str | int | float | None]:
    return {
        "side": side.label,
        "prompt_digest": _digest(secret, _json(side.messages)),
        "answer_digest": _digest(secret, side.answer),
        "num_answer_characters": len(side.answer),
        "finish_reason": side.finish_reason,
        "duration_s": round(side.duration_s, 3),
        "time_to_first_text_s": None if side.time_to_first_text_s is None else round(side.time_to_first_text_s, 3),
    }


def _digest(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def _token_digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _json(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))
