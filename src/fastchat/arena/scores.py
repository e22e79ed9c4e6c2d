"""Bradley-Terry scores of models from counted votes, with bootstrap intervals.

Model i beats j with probability p_i / (p_i + p_j). With x = ln p the score is 1000 + 400 / ln 10 * (x - mean of x): 400
points are odds of ten to one, and the mean of all models is 1000. A tie, and a vote that both are bad, counts as half
a win for each side, as it did in FastChat's leaderboard.

The fit maximises the likelihood of the votes and of `PRIOR` votes that are imagined: each model has once tied with a
model of strength 1 (x = 0). Without them a model that has won all would have no finite score, and groups of models that
never met could not be put on one scale; beside some tens of votes they weigh nothing.

The intervals are the 2.5 and 97.5 percentiles of the scores of bootstrap resamples, drawn with a fixed seed, so that
equal votes give equal intervals. A resample gives each pair as many votes as it had, drawn from the fitted model (the
parametric bootstrap): resampling the votes themselves would call a single vote, or ten wins out of ten, beyond doubt.

Imports numpy when called: call it in a thread.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Integers = NDArray[np.int64]

MEAN_SCORE = 1000.0
POINTS_PER_UNIT = 400.0 / math.log(10.0)
PRIOR = 1.0
NUM_RESAMPLES = 400
SEED = 20230831
"""Of the resamples; any number would do as well."""
_MAX_STEPS = 100
_TOLERANCE = 1e-7
_MAX_FLOATS_AT_ONCE = 250_000


@dataclass(frozen=True, slots=True)
class PairCount:
    """The votes on two models, whichever side each stood on: indices of the models, and how it went."""

    model: int
    other: int
    num_wins: int
    num_losses: int
    num_halves: int
    """Ties and both bad."""


@dataclass(frozen=True, slots=True)
class ModelScore:
    """A model's score and its 95 % interval."""

    score: float
    low: float
    high: float


def score_models(
    num_models: int, pairs: Sequence[PairCount], *, num_resamples: int = NUM_RESAMPLES, prior: float = PRIOR
) -> list[ModelScore]:
    """The scores of models 0 to `num_models` - 1. Each pair of models occurs once in `pairs`."""
    import numpy as np  # the API server needs it for nothing else

    if not num_models:
        return []
    counts = np.array([[pair.num_wins, pair.num_losses, pair.num_halves] for pair in pairs]).reshape(-1, 3)
    fitted = fit_strengths(_wins(counts[None], num_models, pairs), prior=prior)  # (1, num_models)
    chances = _outcome_chances(fitted[0], counts, pairs)
    random = np.random.default_rng(SEED)
    at_once = max(1, _MAX_FLOATS_AT_ONCE // max(num_models * num_models, counts.size))
    resampled = []
    for begin in range(0, num_resamples, at_once):
        size = min(at_once, num_resamples - begin)
        drawn = random.multinomial(counts.sum(axis=1), chances, size=(size, len(pairs)))
        resampled.append(_scores(fit_strengths(_wins(drawn, num_models, pairs), prior=prior, start=fitted)))
    low, high = np.percentile(np.concatenate(resampled), [2.5, 97.5], axis=0)  # (num_models,) each
    return [ModelScore(*map(float, row)) for row in zip(_scores(fitted)[0], low, high, strict=True)]


def fit_strengths(wins: Floats, *, prior: float = PRIOR, start: Floats | None = None) -> Floats:
    """x of each model, from (num_tables, num_models, num_models) wins of row over column, halves included.

    Newton's method. A step never changes a difference of two x by more than 1, and such a step always raises the
    likelihood: the third derivative of the logistic function is bounded by its second (Bach 2010, Self-concordant
    analysis for logistic regression, proposition 1). So any `start` leads to the one maximum, a near one sooner.
    """
    import numpy as np  # as above

    num_tables, num_models, _ = wins.shape
    games = wins + wins.transpose(0, 2, 1)
    x = np.zeros((num_tables, num_models)) if start is None else np.repeat(start, num_tables, axis=0)
    diagonal = np.arange(num_models)
    for _ in range(_MAX_STEPS):
        chance = _logistic(x[:, :, None] - x[:, None, :])  # (num_tables, num_models, num_models)
        own_chance = _logistic(x)
        missed = wins * chance.transpose(0, 2, 1)  # wins that were not expected: exact also where all were
        gradient = missed.sum(axis=2) - missed.sum(axis=1) + prior * (0.5 - own_chance)
        curvature = games * chance * chance.transpose(0, 2, 1)
        hessian = -curvature
        hessian[:, diagonal, diagonal] = 0.0
        hessian[:, diagonal, diagonal] = -hessian.sum(axis=2) + prior * own_chance * (1.0 - own_chance)
        step = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        reach = np.maximum(step.max(axis=1), 0.0) - np.minimum(step.min(axis=1), 0.0)  # x = 0 stays in its place
        step /= np.maximum(reach, 1.0)[:, None]
        x += step
        if np.abs(step).max() < _TOLERANCE:
            break
    return x


def _outcome_chances(x: Floats, counts: Integers, pairs: Sequence[PairCount]) -> Floats:
    """(num_pairs, 3): how likely the fitted model takes a win, a loss and a half.

    A half is as likely as among all votes (and one imagined vote of each kind), as far as the odds leave room for it.
    """
    import numpy as np  # as above

    first, second = _places(pairs)
    expected = _logistic(x[first] - x[second])
    share = (counts[:, 2].sum() + 1) / (counts.sum() + 3)
    half = np.minimum(share, 2.0 * np.minimum(expected, 1.0 - expected))
    won = expected - 0.5 * half
    chances: Floats = np.stack([won, np.maximum(1.0 - won - half, 0.0), half], axis=1)
    return chances


def _wins(counts: Integers, num_models: int, pairs: Sequence[PairCount]) -> Floats:
    """(num_tables, num_pairs, 3) counts as tables of wins."""
    import numpy as np  # as above

    wins = np.zeros((len(counts), num_models, num_models))
    first, second = _places(pairs)
    won, lost, halves = (counts[:, :, outcome] for outcome in range(3))
    wins[:, first, second] = won + 0.5 * halves
    wins[:, second, first] = lost + 0.5 * halves
    return wins


def _places(pairs: Sequence[PairCount]) -> tuple[Integers, Integers]:
    import numpy as np  # as above

    return np.array([pair.model for pair in pairs], np.int64), np.array([pair.other for pair in pairs], np.int64)


def _scores(x: Floats) -> Floats:
    scores: Floats = MEAN_SCORE + POINTS_PER_UNIT * (x - x.mean(axis=1, keepdims=True))
    return scores


def _logistic(x: Floats) -> Floats:
    import numpy as np  # as above

    chance: Floats = 1.0 / (1.0 + np.exp(-x))
    return chance
