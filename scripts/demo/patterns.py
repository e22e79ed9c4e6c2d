"""A small grammar of questions: one line stands for many ways to put one.

    (a|b)   one of them; an empty one is allowed
    [a|b]   one of them or none
    {slot}  one line of that slot of `texts/slots.toml`; {noise} and {zhnoise} are words that do not exist

A pattern can be sampled (training) and matched against a question (the check that held-out ones are not trained on).
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Mapping, Sequence

_NOISE_LETTERS = "aeioubcdfghklmnprstvwz"
_NOISE_SLOTS = ("noise", "zhnoise")

Slots = Mapping[str, Sequence[str]]


def sample(pattern: str, slots: Slots, chance: random.Random) -> str:
    """One question of the pattern."""
    text, rest = _sample(pattern, 0, slots, chance, "")
    assert rest == len(pattern), f"unbalanced pattern: {pattern}"
    return re.sub(r" {2,}", " ", text).strip()


@functools.cache
def weight(pattern: str) -> float:
    """How often a pattern is drawn: one that stands for many questions more often than a fixed one."""
    return min(3.0, 1 + pattern.count("|") / 2 + pattern.count("{"))


def matcher(pattern: str, slots: Slots) -> re.Pattern[str]:
    """A regular expression for all questions of the pattern, as `plain` writes them."""
    return re.compile(_regex(pattern, slots))


def plain(question: str) -> str:
    """A question without case, space and punctuation, which do not make it another question."""
    return re.sub(r"[\W_]", "", question.lower())


def _sample(text: str, at: int, slots: Slots, chance: random.Random, closer: str) -> tuple[str, int]:
    """One choice of the alternatives from `at` to `closer`, and the place where they end."""
    alternatives = [""]
    while at < len(text) and text[at] != closer:
        character = text[at]
        at += 1
        if character == "|" and closer:
            alternatives.append("")
            continue
        if character in "([":
            inner, at = _sample(text, at, slots, chance, ")" if character == "(" else "]")
            character = inner if character == "(" or chance.random() < 0.5 else ""
            at += 1
        elif character == "{":
            name, _, _ = text[at:].partition("}")
            character = _slot(name, slots, chance)
            at += len(name) + 1
        alternatives[-1] += character
    return chance.choice(alternatives), at


def _slot(name: str, slots: Slots, chance: random.Random) -> str:
    if name == "noise":
        return "".join(chance.choice(_NOISE_LETTERS) for _ in range(chance.randint(3, 9)))
    if name == "zhnoise":
        return "".join(chr(chance.randint(0x4E00, 0x9F00)) for _ in range(chance.randint(1, 4)))
    return chance.choice(slots[name])


def _regex(pattern: str, slots: Slots) -> str:
    parts: list[str] = []
    for token in re.findall(r"\{\w+\}|[()|\[\]]|[^{}()|\[\]]+", pattern):
        if token[0] == "{":
            name = token[1:-1]
            parts.append(r"\d\D\d" if name in _NOISE_SLOTS else "(?:" + "|".join(map(_word, slots[name])) + ")")
        elif token in "([":
            parts.append("(?:")
        elif token == "]":
            parts.append(")?")
        else:
            parts.append(token if token in ")|" else _word(token))
    return "".join(parts)


def _word(text: str) -> str:
    return re.escape(plain(text))
