"""Laws of who meets whom in a blind round."""

from collections import Counter
from itertools import permutations

import pytest

from fastchat.arena.chat_models import draw
from fastchat.errors import UnavailableError


def test_each_pair_and_each_order_is_drawn_as_often():
    """A chi-squared test of 12,000 draws; its limit is passed by chance once in a million runs."""
    pool = ["a", "b", "c", "d"]
    counts = Counter(draw(pool, 2) for _ in range(12_000))
    assert set(counts) == set(permutations(pool, 2))
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 47.8  # 11 degrees of freedom


@pytest.mark.parametrize("pool", [[], ["alone"]])
def test_fewer_than_two_models_are_told_as_what_is_missing(pool):
    """The server lacks a model, not the client a field."""
    with pytest.raises(UnavailableError, match="needs 2 models") as error:
        draw(pool, 2)
    assert error.value.code == "too_few_models"
