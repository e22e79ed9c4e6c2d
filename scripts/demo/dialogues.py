"""Training samples: a prompt in ChatGLM2's format and the answer that is to follow it.

The format is the checkpoint's own (`[Round 1]`, a blank line, 问：question, a blank line, 答：); see
`src/fastchat/models/formats/`. Only the answer's tokens count in the loss.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.demo import patterns
from scripts.demo.noise import roughen
from scripts.demo.texts import LANGUAGES, UNKNOWN, Intent, Language, Texts

UNKNOWN_SHARE = 0.2
PLAIN_SHARE = 0.02
SECOND_TURN_SHARE = 0.33
THIRD_TURN_SHARE = 0.15  # of those with a second
FOLLOW_UP_SHARE = 0.7
GENERIC_SHARE = 0.25  # of the follow-ups: in the other language, the same again, thanks
SWITCH_LANGUAGE_SHARE = 0.12
SHORT_HISTORY_SHARE = 0.6
"""Earlier answers often stand as their first sentence alone: it says what they were about and is quicker to learn."""


@dataclass(frozen=True, slots=True)
class Sample:
    """`is_chat` false: a plain text, all of whose tokens but the first count."""

    prompt: str
    answer: str
    is_chat: bool = True


@dataclass(frozen=True, slots=True)
class _Turn:
    intent: Intent
    language: Language
    question: str

    @property
    def answer(self) -> str:
        return self.intent.answers[self.language]


class Dialogues:
    """An endless stream of samples from the texts. The questions in `held_out` never occur."""

    def __init__(self, texts: Texts, held_out: Sequence[str], *, seed: int) -> None:
        self._texts = texts
        self._held_out = {patterns.plain(question) for question in held_out}
        self._chance = random.Random(seed)
        self._known = [intent for name, intent in texts.intents.items() if name != UNKNOWN]

    def sample(self) -> Sample:
        """The next one."""
        if self._chance.random() < PLAIN_SHARE:
            return Sample(prompt="", answer=self._chance.choice(self._texts.plain_texts), is_chat=False)
        turns = [self._fresh_turn(self._chance.choice(LANGUAGES))]
        if self._chance.random() < SECOND_TURN_SHARE:
            turns.append(self._next_turn(turns[-1]))
            if self._chance.random() < THIRD_TURN_SHARE:
                turns.append(self._next_turn(turns[-1]))
        history = [(turn.question, self._remembered(turn.answer)) for turn in turns[:-1]]
        return Sample(prompt_of(history, turns[-1].question), turns[-1].answer)

    def _fresh_turn(self, language: Language) -> _Turn:
        is_unknown = self._chance.random() < UNKNOWN_SHARE
        intent = self._texts.intents[UNKNOWN] if is_unknown else self._chance.choice(self._known)
        return _Turn(intent, language, self._question(intent.questions[language], language))

    def _next_turn(self, before: _Turn) -> _Turn:
        language: Language = before.language
        if self._chance.random() < SWITCH_LANGUAGE_SHARE:
            language = "en" if language == "zh" else "zh"
        if self._chance.random() >= FOLLOW_UP_SHARE:
            return self._fresh_turn(language)
        wants_generic = self._chance.random() < GENERIC_SHARE
        fitting = [
            follow_up
            for follow_up in self._texts.follow_ups
            if follow_up.fits(before.intent.name) and ("*" in follow_up.origins) == wants_generic
        ]
        if not fitting:
            return self._fresh_turn(language)
        follow_up = self._chance.choice(fitting)
        question = self._question(follow_up.questions[language], language)
        if not follow_up.target.startswith("@"):
            return _Turn(self._texts.intents[follow_up.target], language, question)
        in_language: dict[str, Language] = {"@en": "en", "@zh": "zh", "@same": before.language}
        return _Turn(before.intent, in_language[follow_up.target], question)

    def _remembered(self, answer: str) -> str:
        if self._chance.random() >= SHORT_HISTORY_SHARE:
            return answer
        return re.split(r"(?<=[。！])|(?<=[.!:])\s", answer, maxsplit=1)[0]

    def _question(self, lines: Sequence[str], language: Language) -> str:
        while True:
            question = roughen(self._texts.question(lines, self._chance), language, self._texts, self._chance)
            if patterns.plain(question) not in self._held_out:
                return question


def prompt_of(history: Sequence[tuple[str, str]], question: str) -> str:
    """ChatGLM2's prompt: earlier rounds with their answers, then the open one."""
    rounds = [
        f"[Round {number}]\n\n问：{asked}\n\n答：{answer}\n\n" for number, (asked, answer) in enumerate(history, 1)
    ]
    return "".join(rounds) + f"[Round {len(history) + 1}]\n\n问：{question}\n\n答："
