"""Laws of the leaderboard: which votes count, what is counted, when it is computed anew."""

import asyncio
from contextlib import asynccontextmanager

import orjson
import pytest

from fastchat.arena.database import Database
from fastchat.arena.leaderboard import Leaderboards
from fastchat.arena.leaderboard_query import parse_vote_filter
from fastchat.arena.records import SCHEMA, ArenaRecords, FinishedSide, RoundKey
from fastchat.arena.vote_log import VoteFilter, VoteLog
from fastchat.errors import InvalidRequestError


class Clock:
    """Seconds since 1970, as told."""

    now = 1_700_000_000.0

    def __call__(self):
        return self.now


class Arena:
    """Records and leaderboards of one file, without a server."""

    def __init__(self, path, *, logs_text=False):
        self.writer = Database(path, SCHEMA, writes=True)
        self.reader = Database(path, SCHEMA, writes=False)
        self.clock = Clock()
        self.records = ArenaRecords(self.writer, logs_text=logs_text, clock=self.clock)
        self.votes = VoteLog(self.reader)
        self.boards = Leaderboards(self.votes)

    async def play(self, model_a, model_b, vote, *, language="en", is_blind=True, tenant="t"):
        state, token = await self.records.begin_round([model_a, model_b], is_blind=is_blind, tenant=tenant)
        sides = [FinishedSide(label, [{"role": "user", "content": "Hi"}], "Hello", "stop", 1.0, 0.1) for label in "ab"]
        assert await self.records.finish_turn(state, sides, language)
        await self.records.vote(RoundKey(state.round_id, token, tenant), vote)
        return state.round_id

    async def board(self, **wanted):
        return orjson.loads(await self.boards.document(VoteFilter(**wanted)))


@asynccontextmanager
async def opened(path, **options):
    arena = Arena(path, **options)
    await arena.writer.open()
    await arena.reader.open()
    try:
        yield arena
    finally:
        await arena.reader.close()
        await arena.writer.close()


@pytest.fixture
def with_arena(tmp_path):
    """Runs a coroutine function with a fresh arena."""

    def run(use, **options):
        async def whole():
            async with opened(tmp_path / "arena.sqlite", **options) as arena:
                return await use(arena)

        return asyncio.run(whole())

    return run


def test_counts_matrix_and_rates_add_up(with_arena):
    """Sides do not matter; a tie and both bad are half a win in the rate, and counted on their own."""

    async def use(arena):
        for model_a, model_b, vote in [
            *[("x", "y", "a")] * 3,
            ("y", "x", "b"),
            ("y", "x", "a"),
            ("x", "y", "tie"),
            ("y", "x", "both_bad"),
        ]:
            await arena.play(model_a, model_b, vote)
        return await arena.board()

    board = with_arena(use)
    first, second = board["models"]
    assert (board["num_votes"], board["num_groups"]) == (7, 1)
    assert [first[name] for name in ("model", "wins", "losses", "ties", "both_bad")] == ["x", 4, 1, 1, 1]
    assert [second[name] for name in ("model", "wins", "losses", "ties", "both_bad")] == ["y", 1, 4, 1, 1]
    assert first["win_rate"] == round(5 / 7, 4)
    assert board["win_matrix"] == {
        "models": ["x", "y"],
        "wins": [[0, 4], [1, 0]],
        "num_votes": [[0, 7], [7, 0]],
        "win_rates": [[None, round(5 / 7, 4)], [round(2 / 7, 4), None]],
    }


def test_window_language_and_kind_choose_votes(with_arena):
    """A vote counts from `since` on and before `until`."""

    async def use(arena):
        began = arena.clock.now
        await arena.play("x", "y", "a", language="zh")
        arena.clock.now = began + 100
        await arena.play("x", "y", "b", is_blind=False)
        filters = [
            {},
            {"since": began},
            {"since": began + 100},
            {"until": began + 100},
            {"until": began},
            {"language": "zh"},
            {"language": "ko"},
            {"is_blind": True},
            {"is_blind": False, "language": "zh"},
        ]
        return [(await arena.board(**wanted))["num_votes"] for wanted in filters]

    assert with_arena(use) == [2, 2, 1, 1, 0, 1, 0, 1, 0]


def test_rank_counts_only_models_that_are_surely_better(with_arena):
    """Intervals that overlap share a rank; groups that no vote connects are told."""

    async def use(arena):
        for _ in range(40):
            await arena.play("best", "worst", "a")
        await arena.play("lone", "other", "a")
        return await arena.board()

    board = with_arena(use)
    rank = {row["model"]: row["rank"] for row in board["models"]}
    group = {row["model"]: row["group"] for row in board["models"]}
    assert rank["best"] == 1 < rank["worst"]
    assert rank["lone"] == rank["other"]
    assert group["best"] == group["worst"] != group["lone"] == group["other"]
    assert board["num_groups"] == 2


def test_a_board_is_kept_until_the_next_vote(with_arena):
    """The same bytes object while nothing was voted, a new one after."""

    async def use(arena):
        await arena.play("x", "y", "a")
        first = await arena.boards.document(VoteFilter())
        assert await arena.boards.document(VoteFilter()) is first
        await arena.play("x", "y", "a")
        return first, await arena.boards.document(VoteFilter())

    first, second = with_arena(use)
    assert orjson.loads(first)["num_votes"] == 1
    assert orjson.loads(second)["num_votes"] == 2


def test_rounds_without_a_vote_are_forgotten_and_voted_ones_kept(with_arena):
    """After the lifetime, with their texts, by the next one that begins: few rounds are not kept longer than many."""

    async def use(arena):
        state, _ = await arena.records.begin_round(["x", "y"], is_blind=True, tenant="t")
        await arena.play("x", "y", "a")
        arena.clock.now += 8 * 24 * 3600
        await arena.records.begin_round(["x", "y"], is_blind=True, tenant="t")
        rows = await arena.reader.run(
            lambda db: db.execute(
                "SELECT round_id FROM rounds WHERE is_voted OR round_id = ?", (state.round_id,)
            ).fetchall()
        )
        return state.round_id, [row[0] for row in rows]

    forgotten, kept = with_arena(use)
    assert len(kept) == 1
    assert forgotten not in kept


@pytest.mark.parametrize("logs_text", [False, True])
def test_text_is_kept_only_where_it_was_asked_for(with_arena, logs_text, tmp_path):
    """Without the flag no word of a conversation is anywhere in the files."""

    async def use(arena):
        state, _ = await arena.records.begin_round(["x", "y"], is_blind=True, tenant="t")
        messages = [{"role": "user", "content": "a-secret-question"}]
        await arena.records.finish_turn(
            state, [FinishedSide(label, messages, "a-secret-answer", "stop", 1.0, 0.1) for label in "ab"], "en"
        )
        return b"".join(path.read_bytes() for path in tmp_path.iterdir())

    written = with_arena(use, logs_text=logs_text)
    assert (b"a-secret-question" in written) is (b"a-secret-answer" in written) is logs_text


def test_an_older_attempt_that_ends_late_counts_no_more(with_arena):
    """A turn that was asked again is complete when its newest attempt is."""

    async def use(arena):
        state, token = await arena.records.begin_round(["x", "y"], is_blind=True, tenant="t")
        await arena.records.begin_turn(RoundKey(state.round_id, token, "t"), is_retry=True)
        sides = [FinishedSide(label, [], "late", "stop", 1.0, 0.1) for label in "ab"]
        return await arena.records.finish_turn(state, sides, "en")

    assert with_arena(use) is False


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([], VoteFilter()),
        ([("since", "1700000000"), ("until", "1700000000.5")], VoteFilter(1700000000.0, 1700000000.5)),
        ([("since", "2026-01-01")], VoteFilter(since=1767225600.0)),
        ([("until", "2026-01-01T08:00:00+08:00")], VoteFilter(until=1767225600.0)),
        ([("until", "2026-01-01T08:00:00 08:00")], VoteFilter(until=1767225600.0)),
        ([("since", "2026-01-01T00:00:00Z"), ("language", "")], VoteFilter(since=1767225600.0)),
        ([("language", "zh"), ("anonymous", "true")], VoteFilter(language="zh", is_blind=True)),
        ([("anonymous", "0")], VoteFilter(is_blind=False)),
    ],
)
def test_a_query_is_understood(items, expected):
    """Dates are UTC where they name no zone; an unescaped plus has become a space."""
    assert parse_vote_filter(items) == expected


@pytest.mark.parametrize(
    "items",
    [
        [("since", "yesterday")],
        [("since", "-5")],
        [("since", "1e9")],
        [("since", "９")],
        [("since", "20"), ("until", "10")],
        [("language", "English")],
        [("anonymous", "maybe")],
        [("limit", "5")],
        [("since", "1"), ("since", "2")],
        [("since", "9" * 400)],
        [("since", "nan")],
    ],
)
def test_a_query_that_is_not_understood_names_the_field(items):
    """Nothing is accepted and ignored."""
    with pytest.raises(InvalidRequestError) as error:
        parse_vote_filter(items)
    assert error.value.param in {name for name, _ in items}
