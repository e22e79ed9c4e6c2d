"""What was voted, read: counts for the leaderboard and lines for the export. It has a connection of its own.

A reader never waits for a writer, nor holds one up (SQLite's WAL).
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson

from fastchat.arena.database import Database
from fastchat.arena.language import Language

_ROWS_AT_ONCE = 500

Json = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class VoteFilter:
    """Which votes count: `since` <= time < `until`, in seconds since 1970. None: whatever."""

    since: float | None = None
    until: float | None = None
    language: Language | None = None
    is_blind: bool | None = None


@dataclass(frozen=True, slots=True)
class VoteCounts:
    """How often each outcome was voted for two models, by their names in order."""

    model: str
    other: str
    num_wins: int
    num_losses: int
    num_ties: int
    num_both_bad: int


class VoteLog:
    """Reads `database`, which `ArenaRecords` writes through a connection of its own."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def last_number(self) -> int:
        """Grows with every vote."""
        return await self._database.run(
            lambda connection: int(connection.execute("SELECT IFNULL(MAX(number), 0) FROM votes").fetchone()[0])
        )

    async def counts(self, wanted: VoteFilter) -> list[VoteCounts]:
        """The votes, counted; sorted by names."""
        where, values = _where(wanted)

        def work(connection: sqlite3.Connection) -> list[tuple[str, str, str, int]]:
            return connection.execute(
                f"SELECT model_a, model_b, vote, COUNT(*) FROM votes {where} GROUP BY model_a, model_b, vote",  # noqa: S608 - `where` is made of constants
                values,
            ).fetchall()

        return _by_pair(await self._database.run(work))

    async def export(self, *, tenant: str | None) -> AsyncIterator[bytes]:
        """Votes, then feedback, as JSON lines, some in each piece; of one tenant, or of all with None.

        The first rows are read before this returns, so that a failure is known before anything is sent.
        """
        tables = [(_VOTES, _vote_line), (_FEEDBACK, _feedback_line)]
        first = await self._rows(_VOTES, 0, tenant)

        async def pieces() -> AsyncIterator[bytes]:
            for statement, line_of in tables:
                rows = first if statement is _VOTES else await self._rows(statement, 0, tenant)
                while rows:
                    yield b"".join(orjson.dumps(line_of(row)) + b"\n" for row in rows)
                    rows = await self._rows(statement, rows[-1]["number"], tenant)

        return pieces()

    async def _rows(self, statement: str, after: int, tenant: str | None) -> list[sqlite3.Row]:
        def work(connection: sqlite3.Connection) -> list[sqlite3.Row]:
            cursor = connection.cursor()
            cursor.row_factory = sqlite3.Row
            return cursor.execute(statement, {"after": after, "tenant": tenant, "limit": _ROWS_AT_ONCE}).fetchall()

        return await self._database.run(work)


_VOTES = """
SELECT * FROM votes WHERE number > :after AND (:tenant IS NULL OR tenant = :tenant) ORDER BY number LIMIT :limit
"""
_FEEDBACK = """
SELECT * FROM feedback WHERE number > :after AND (:tenant IS NULL OR tenant = :tenant) ORDER BY number LIMIT :limit
"""


def _where(wanted: VoteFilter) -> tuple[str, list[float | str | bool]]:
    conditions = {
        "voted_at >= ?": wanted.since,
        "voted_at < ?": wanted.until,
        "language = ?": wanted.language,
        "is_blind = ?": wanted.is_blind,
    }
    given = {condition: value for condition, value in conditions.items() if value is not None}
    return ("WHERE " + " AND ".join(given) if given else ""), list(given.values())


def _by_pair(rows: list[tuple[str, str, str, int]]) -> list[VoteCounts]:
    counts: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for model_a, model_b, vote, number in rows:
        is_in_order = model_a < model_b
        outcome = vote if is_in_order else {"a": "b", "b": "a"}.get(vote, vote)
        counts[(model_a, model_b) if is_in_order else (model_b, model_a)][outcome] += number
    return [
        VoteCounts(*pair, outcomes["a"], outcomes["b"], outcomes["tie"], outcomes["both_bad"])
        for pair, outcomes in sorted(counts.items())
    ]


def _vote_line(row: sqlite3.Row) -> Json:
    return {
        "type": "vote",
        "number": row["number"],
        "voted_at": _iso(row["voted_at"]),
        "round_id": row["round_id"],
        "models": {"a": row["model_a"], "b": row["model_b"]},
        "vote": row["vote"],
        "blind": bool(row["is_blind"]),
        "language": row["language"],
        "num_turns": row["num_turns"],
        "sides": json.loads(row["sides"]),
    }


def _feedback_line(row: sqlite3.Row) -> Json:
    return {
        "type": "feedback",
        "number": row["number"],
        "voted_at": _iso(row["voted_at"]),
        "id": row["answer_id"],
        "model": row["model"],
        "vote": row["vote"],
    }


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
