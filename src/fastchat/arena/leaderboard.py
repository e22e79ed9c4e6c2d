"""GET /api/v1/leaderboard: scores, intervals, counts and the win matrix of a set of votes, as one document.

Computed in a thread, one at a time, and kept until the next vote.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import orjson

from fastchat.arena.scores import MEAN_SCORE, NUM_RESAMPLES, ModelScore, PairCount, score_models
from fastchat.arena.vote_log import VoteCounts, VoteFilter, VoteLog
from fastchat.errors import UnavailableError

MAX_KEPT = 64
MAX_WAITING = 32

Json = dict[str, Any]  # Any: JSON


class Leaderboards:
    """The leaderboards of a vote log, each computed once for the votes there are."""

    def __init__(self, votes: VoteLog) -> None:
        self._votes = votes
        self._lock = asyncio.Lock()
        self._num_waiting = 0
        self._kept: OrderedDict[VoteFilter, tuple[int, bytes]] = OrderedDict()

    def __repr__(self) -> str:
        return f"<Leaderboards kept={len(self._kept)} waiting={self._num_waiting}>"

    async def document(self, wanted: VoteFilter) -> bytes:
        """The leaderboard as JSON. Raises `UnavailableError`."""
        if self._num_waiting >= MAX_WAITING:
            raise UnavailableError("Too many ask for leaderboards at once; try again.", code="arena_busy")
        self._num_waiting += 1
        try:
            async with self._lock:
                return await self._fresh(wanted)
        finally:
            self._num_waiting -= 1

    async def _fresh(self, wanted: VoteFilter) -> bytes:
        last_number = await self._votes.last_number()
        known = self._kept.get(wanted)
        if known is None or known[0] != last_number:
            counts = await self._votes.counts(wanted)
            document = await asyncio.to_thread(_computed, wanted, counts)
            known = (last_number, document)
            self._kept[wanted] = known
        self._kept.move_to_end(wanted)
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return known[1]


def _computed(wanted: VoteFilter, counts: Sequence[VoteCounts]) -> bytes:
    return orjson.dumps(leaderboard(wanted, counts))


def leaderboard(wanted: VoteFilter, counts: Sequence[VoteCounts]) -> Json:
    """The document of `counts`. Heavy for many models."""
    names = sorted({name for pair in counts for name in (pair.model, pair.other)})
    number_of = {name: number for number, name in enumerate(names)}
    pairs = [
        PairCount(
            number_of[pair.model],
            number_of[pair.other],
            pair.num_wins,
            pair.num_losses,
            pair.num_ties + pair.num_both_bad,
        )
        for pair in counts
    ]
    scores = dict(zip(names, score_models(len(names), pairs), strict=True))
    groups = _groups(names, counts)
    ranked = sorted(names, key=lambda name: (-scores[name].score, name))
    return {
        "object": "leaderboard",
        "since": wanted.since,
        "until": wanted.until,
        "language": wanted.language,
        "anonymous": wanted.is_blind,
        "num_votes": sum(_num_votes(pair) for pair in counts),
        "num_groups": len(set(groups.values())),
        "scale": {"mean": MEAN_SCORE, "points_for_odds_of_ten": 400, "num_resamples": NUM_RESAMPLES},
        "models": [_row(name, scores, counts, groups[name]) for name in ranked],
        "win_matrix": _matrix(ranked, counts),
    }


def _row(name: str, scores: dict[str, ModelScore], counts: Sequence[VoteCounts], group: int) -> Json:
    own = scores[name]
    played = [_seen_from(name, pair) for pair in counts if name in (pair.model, pair.other)]
    wins, losses, ties, both_bad = (sum(outcome) for outcome in zip(*played, strict=True))
    num_votes = wins + losses + ties + both_bad
    return {
        "model": name,
        "rank": 1 + sum(other.low > own.high for other in scores.values()),
        "score": round(own.score, 2),
        "interval": [round(own.low, 2), round(own.high, 2)],
        "num_votes": num_votes,
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "both_bad": both_bad,
        "win_rate": round((wins + 0.5 * (ties + both_bad)) / num_votes, 4),
        "group": group,
    }


def _seen_from(name: str, pair: VoteCounts) -> tuple[int, int, int, int]:
    won, lost = (pair.num_wins, pair.num_losses) if name == pair.model else (pair.num_losses, pair.num_wins)
    return won, lost, pair.num_ties, pair.num_both_bad


def _matrix(names: Sequence[str], counts: Sequence[VoteCounts]) -> Json:
    """Rows over columns, in the order of `models`: votes won, votes in all, and the share won with ties as half."""
    place = {name: number for number, name in enumerate(names)}
    wins = [[0] * len(names) for _ in names]
    totals = [[0] * len(names) for _ in names]
    rates: list[list[float | None]] = [[None] * len(names) for _ in names]
    for pair in counts:
        num_votes = _num_votes(pair)
        for row, column, num_wins in (
            (place[pair.model], place[pair.other], pair.num_wins),
            (place[pair.other], place[pair.model], pair.num_losses),
        ):
            wins[row][column] = num_wins
            totals[row][column] = num_votes
            rates[row][column] = round((num_wins + 0.5 * (pair.num_ties + pair.num_both_bad)) / num_votes, 4)
    return {"models": list(names), "wins": wins, "num_votes": totals, "win_rates": rates}


def _num_votes(pair: VoteCounts) -> int:
    return pair.num_wins + pair.num_losses + pair.num_ties + pair.num_both_bad


def _groups(names: Sequence[str], counts: Sequence[VoteCounts]) -> dict[str, int]:
    """Models that votes connect, numbered from 0: scores of different groups say little about each other."""
    group = {name: number for number, name in enumerate(names)}
    for pair in counts:
        kept, merged = sorted((group[pair.model], group[pair.other]))
        group = {name: kept if number == merged else number for name, number in group.items()}
    order = {number: place for place, number in enumerate(sorted(set(group.values())))}
    return {name: order[number] for name, number in group.items()}
