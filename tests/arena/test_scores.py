"""Laws of the scores: known answers by another algorithm, ties, the prior, and what the intervals promise."""

import math
import random
from collections import Counter
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat.arena.scores import MEAN_SCORE, POINTS_PER_UNIT, PRIOR, PairCount, score_models


def counted(battles):
    """Battles (winner, loser, or a pair with `half`) as counts of each pair."""
    outcomes = Counter()
    for first, second, result in battles:
        low, high = sorted((first, second))
        outcomes[
            low, high, result if result == "half" else ("win" if (result == "first") is (first == low) else "loss")
        ] += 1
    pairs = sorted({(low, high) for low, high, _ in outcomes})
    return [PairCount(*pair, *(outcomes[(*pair, kind)] for kind in ("win", "loss", "half"))) for pair in pairs]


def scores_by_minorization(num_models, battles, prior=PRIOR, num_rounds=60_000):
    """The same scores from single battles: Hunter's MM algorithm (2004, The Annals of Statistics 32) in plain Python.

    The imagined ties are played against one more player, whose strength stays 1.
    """
    games = []
    for first, second, result in battles:
        share = {"first": 1.0, "second": 0.0, "half": 0.5}[result]
        games.append((first, second, share))
    wins = [0.5 * prior] * num_models
    meetings = Counter()
    for first, second, share in games:
        wins[first] += share
        wins[second] += 1.0 - share
        meetings[first, second] += 1
    strengths = [1.0] * num_models
    for _ in range(num_rounds):
        weights = [prior / (strength + 1.0) for strength in strengths]
        for (first, second), number in meetings.items():
            share = number / (strengths[first] + strengths[second])
            weights[first] += share
            weights[second] += share
        before, strengths = strengths, [won / weight for won, weight in zip(wins, weights, strict=True)]
        if max(abs(math.log(new / old)) for new, old in zip(strengths, before, strict=True)) < 1e-12:
            break
    logs = [math.log(strength) for strength in strengths]
    return [1000.0 + 400.0 / math.log(10.0) * (log - mean(logs)) for log in logs]


def played(strengths, num_battles, seed, tie_share=0.0):
    """Battles between models of these strengths (natural logarithms), by chance."""
    chance = random.Random(seed)
    battles = []
    for _ in range(num_battles):
        first, second = chance.sample(range(len(strengths)), 2)
        expected = 1.0 / (1.0 + math.exp(strengths[second] - strengths[first]))
        half = min(tie_share, 2 * expected, 2 * (1 - expected))
        drawn = chance.random()
        result = "half" if drawn < half else "first" if drawn < half + expected - half / 2 else "second"
        battles.append((first, second, result))
    return battles


def scores(num_models, battles, **options):
    return [each.score for each in score_models(num_models, counted(battles), **options)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tie_share", [0.0, 0.3])
def test_scores_equal_those_of_an_independent_algorithm(seed, tie_share):
    """Newton's method on counts and minorization on single battles meet in the same maximum."""
    strengths = [random.Random(seed).gauss(0, 1) for _ in range(6)]
    battles = played(strengths, 300, seed, tie_share)
    assert scores(6, battles) == pytest.approx(scores_by_minorization(6, battles), abs=1e-3)


def test_two_models_have_the_closed_form():
    """Without the prior, the difference is 400 times the decimal logarithm of the odds."""
    first, second = scores(2, [(0, 1, "first")] * 30 + [(0, 1, "second")] * 10, prior=1e-9)
    assert first - second == pytest.approx(400 * math.log10(3), abs=1e-3)
    assert first + second == pytest.approx(2000)


def test_ten_to_one_are_four_hundred_points():
    """The scale is the usual one."""
    assert pytest.approx(400) == POINTS_PER_UNIT * math.log(10)


def test_a_tie_is_half_a_win_for_each():
    """Two ties weigh as one win and one loss."""
    ties = [PairCount(0, 1, 7, 2, 6), PairCount(0, 2, 3, 3, 0), PairCount(1, 2, 4, 1, 0)]
    halves = [PairCount(0, 1, 10, 5, 0), *ties[1:]]
    assert [s.score for s in score_models(3, ties)] == pytest.approx([s.score for s in score_models(3, halves)])


def test_a_model_that_has_won_all_is_finite_and_first():
    """Also where thousands of votes agree."""
    champion, loser, other = score_models(3, [PairCount(0, 1, 5000, 0, 0), PairCount(0, 2, 5000, 0, 0)])
    assert champion.score > other.score == pytest.approx(loser.score)
    assert all(math.isfinite(bound) for each in (champion, loser) for bound in (each.low, each.score, each.high))


def test_models_that_never_met_stand_on_one_scale():
    """Two pairs without a connection: winners are alike, losers are alike."""
    first, second, third, fourth = (
        each.score for each in score_models(4, [PairCount(0, 1, 9, 3, 0), PairCount(2, 3, 9, 3, 0)])
    )
    assert (first, second) == pytest.approx((third, fourth))
    assert first > MEAN_SCORE > second


def test_one_vote_proves_nothing():
    """After a single vote, or a single tie, the intervals of both models overlap."""
    for pair in (PairCount(0, 1, 1, 0, 0), PairCount(0, 1, 0, 0, 1)):
        first, second = score_models(2, [pair])
        assert first.low < second.high
        assert second.low < first.high
        assert first.high - first.low > 100


def test_equal_votes_give_equal_numbers():
    """The seed is fixed: no number moves between two calls."""
    battles = counted(played([0.0, 0.5, 1.0], 200, seed=1))
    assert score_models(3, battles) == score_models(3, battles)


@pytest.mark.parametrize("tie_share", [0.0, 0.25])
def test_intervals_hold_the_truth_as_often_as_they_say(tie_share):
    """Simulated boards: of all true scores, about 95 in 100 lie in their intervals."""
    strengths = [-0.8, -0.3, 0.0, 0.3, 0.8]
    truth = [MEAN_SCORE + POINTS_PER_UNIT * (x - mean(strengths)) for x in strengths]
    held = []
    for seed in range(60):
        board = score_models(5, counted(played(strengths, 400, seed, tie_share)), num_resamples=200)
        held += [each.low <= true <= each.high for each, true in zip(board, truth, strict=True)]
    assert 0.91 <= mean(held) <= 0.99


pair_counts = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 5), *[st.integers(0, 40)] * 3).filter(lambda row: row[0] < row[1]),
    min_size=1,
    max_size=12,
    unique_by=lambda row: row[:2],
)


@settings(max_examples=60)
@given(pair_counts)
def test_any_votes_have_finite_scores_in_their_intervals_around_the_mean(rows):
    """Whatever was voted: finite, mean 1000, and who won all of its votes is not below who lost all."""
    board = score_models(6, [PairCount(*row) for row in rows], num_resamples=50)
    assert mean(each.score for each in board) == pytest.approx(MEAN_SCORE)
    for each in board:
        assert each.low <= each.high
        assert all(map(math.isfinite, (each.low, each.score, each.high)))


@settings(max_examples=40)
@given(pair_counts)
def test_swapping_sides_mirrors_the_scores(rows):
    """With every win turned into a loss, each score is as far on the other side of 1000."""
    board = score_models(6, [PairCount(*row) for row in rows], num_resamples=2)
    mirrored = score_models(6, [PairCount(i, j, lost, won, half) for i, j, won, lost, half in rows], num_resamples=2)
    for each, other in zip(board, mirrored, strict=True):
        assert each.score - MEAN_SCORE == pytest.approx(MEAN_SCORE - other.score, abs=1e-3)
