"""The held-out questions of `heldout.json`, and whether an answer holds what it must."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "heldout.json"
HELD_OUT_LISTS = ("held_out", "strangers", "unseen")


@dataclass(frozen=True, slots=True)
class Question:
    """The user's turns of a dialogue; the last answer must hold one text of each list of `facts`."""

    language: str
    turns: tuple[str, ...]
    facts: tuple[tuple[str, ...], ...]

    def is_answered_by(self, answer: str) -> bool:
        """Whether every fact is in the answer."""
        return all(any(text in answer for text in fact) for fact in self.facts)


def load_held_out(file: Path = FILE, lists: Sequence[str] = HELD_OUT_LISTS) -> list[Question]:
    """Questions that training never sees word for word."""
    return [question for name in lists for question in _questions(file, name)]


def load_guide(file: Path = FILE) -> list[Question]:
    """The guide's own questions, which training does see and which must always be right."""
    return _questions(file, "guide")


def _questions(file: Path, key: str) -> list[Question]:
    rows: Sequence[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))[key]  # Any: JSON
    return [Question(row["lang"], tuple(row["turns"]), tuple(tuple(fact) for fact in row["facts"])) for row in rows]
