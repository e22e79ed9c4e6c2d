"""The texts of `texts/*.toml` as objects: intents with their questions and answers, follow-ups, plain texts."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scripts.demo import patterns

FOLDER = Path(__file__).parent / "texts"
UNKNOWN = "unknown"
Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")


@dataclass(frozen=True, slots=True)
class Intent:
    """Something that can be asked: patterns of questions and one answer in each language."""

    name: str
    questions: Mapping[Language, Sequence[str]]
    answers: Mapping[Language, str]


@dataclass(frozen=True, slots=True)
class FollowUp:
    """A question that leans on the turn before. `target` is an intent, or `@same`, `@en`, `@zh`."""

    origins: frozenset[str]
    target: str
    questions: Mapping[Language, Sequence[str]]

    def fits(self, intent: str) -> bool:
        """Whether it can follow an answer of that intent."""
        return "*" in self.origins or intent in self.origins


@dataclass(frozen=True, slots=True)
class Texts:
    """Everything that was written for the demo model."""

    slots: Mapping[str, Sequence[str]]
    synonyms: Mapping[Language, Mapping[str, Sequence[str]]]
    """For a word, the words of its group."""
    intents: Mapping[str, Intent]
    follow_ups: Sequence[FollowUp]
    plain_texts: Sequence[str]

    @classmethod
    def load(cls) -> Texts:
        """Read all files of the folder."""
        files = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.toml"))}
        intents = [
            Intent(table["name"], _questions(table), {language: table[f"answer_{language}"] for language in LANGUAGES})
            for file in files.values()
            for table in file.get("intent", [])
        ]
        follow_ups = [
            FollowUp(frozenset(table["from"]), table["to"], _questions(table))
            for table in files["followups"]["followup"]
        ]
        texts = cls(
            slots={name: _lines(value) for name, value in files["slots"].items()},
            synonyms={language: _groups(files["synonyms"][language]) for language in LANGUAGES},
            intents={intent.name: intent for intent in intents},
            follow_ups=follow_ups,
            plain_texts=files["completions"]["texts"],
        )
        texts._check(len(intents))
        return texts

    def question(self, questions: Sequence[str], chance: random.Random) -> str:
        """One of the questions."""
        weights = [patterns.weight(line) for line in questions]
        return patterns.sample(chance.choices(questions, weights)[0], self.slots, chance)

    def all_patterns(self) -> list[str]:
        """Every pattern of every language, follow-ups too."""
        return [line for questions in self.all_questions() for language in LANGUAGES for line in questions[language]]

    def all_questions(self) -> list[Mapping[Language, Sequence[str]]]:
        """The questions of every intent and follow-up."""
        return [intent.questions for intent in self.intents.values()] + [each.questions for each in self.follow_ups]

    def trained_word_for_word(self, questions: Sequence[str]) -> list[str]:
        """Those of the questions that some pattern can produce."""
        expressions = [patterns.matcher(line, self.slots) for line in self.all_patterns()]
        return [
            question
            for question in questions
            if any(expression.fullmatch(patterns.plain(question)) for expression in expressions)
        ]

    def _check(self, num_intents: int) -> None:
        assert len(self.intents) == num_intents, "two intents have one name"
        names = set(self.intents)
        for follow_up in self.follow_ups:
            unknown = (follow_up.origins | {follow_up.target}) - names - {"*", "@same", "@en", "@zh"}
            assert not unknown, f"a follow-up names intents that are not there: {unknown}"
        chance = random.Random(0)
        for line in self.all_patterns():
            patterns.sample(line, self.slots, chance)


def _questions(table: Mapping[str, str]) -> dict[Language, list[str]]:
    return {language: _lines(table[language]) for language in LANGUAGES}


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def _groups(text: str) -> dict[str, list[str]]:
    groups = [line.split("|") for line in _lines(text)]
    return {word: group for group in groups for word in group}
