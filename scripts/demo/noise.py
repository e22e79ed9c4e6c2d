"""How people really type: other words, politeness, punctuation, casing, typos. Applied to questions only."""

from __future__ import annotations

import random
import re

from scripts.demo.texts import Language, Texts

_ENDS: dict[Language, tuple[tuple[str, int], ...]] = {
    "en": (("?", 55), ("", 28), (".", 6), ("!", 4), (" ?", 3), ("??", 2), ("...", 2)),
    "zh": (("？", 52), ("", 24), ("?", 12), ("。", 5), ("！", 4), ("??", 1), ("…", 1)),
}

_HASTY: dict[Language, dict[str, str]] = {
    "en": {
        "please": "pls",
        "thanks": "thx",
        "you": "u",
        "are": "r",
        "your": "ur",
        "what's": "whats",
        "what is": "whats",
        "how is": "hows",
        "where is": "wheres",
        "it is": "its",
        "I am": "im",
        "I'm": "im",
        "don't": "dont",
        "do not": "dont",
        "can't": "cant",
        "cannot": "cant",
        "doesn't": "doesnt",
        "does not": "doesnt",
        "isn't": "isnt",
        "without": "w/o",
    },
    "zh": {
        "怎么": "咋",
        "什么": "啥",
        "为什么": "为啥",
        "怎么办": "咋整",
        "吗": "么",
        "没有": "没",
        "请问": "问下",
        "可以": "能",
    },
}
"""How words are written in haste."""


def roughen(question: str, language: Language, texts: Texts, chance: random.Random) -> str:
    """The question as somebody might type it; words around it are the slots `before_*` and `after_*`."""
    space = " " if language == "en" else ""
    if chance.random() < 0.35:
        question = _reworded(question, language, texts, chance)
    if chance.random() < 0.15:
        question = _hasty(question, language, chance)
    if chance.random() < 0.2:
        question = chance.choice(texts.slots[f"before_{language}"]) + space + question
    if chance.random() < 0.12:
        question = (question + space + chance.choice(texts.slots[f"after_{language}"])).replace(" ,", ",")
    question = re.sub("fastchat", chance.choice(("fastchat", "FastChat", "FastChat", "Fastchat")), question, flags=re.I)
    if chance.random() < 0.08:
        question = _mistyped(question, language, chance)
    elif chance.random() < 0.12:
        question = _thinned(question, language, chance)
    question = _spaced(question, chance) if language == "zh" else _cased(question, chance)
    ends, weights = zip(*_ENDS[language], strict=True)
    end: str = chance.choices(ends, weights)[0]
    return question + end


def _reworded(question: str, language: Language, texts: Texts, chance: random.Random) -> str:
    """Some words replaced by others of their group."""
    groups = texts.synonyms[language]
    words = "|".join(map(re.escape, sorted(groups, key=len, reverse=True)))
    pattern = rf"\b(?:{words})\b" if language == "en" else words
    return re.sub(
        pattern, lambda found: chance.choice(groups[found[0]]) if chance.random() < 0.5 else found[0], question
    )


def _hasty(question: str, language: Language, chance: random.Random) -> str:
    words = _HASTY[language]
    pattern = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    pattern = rf"(?<!\w)(?:{pattern})(?!\w)" if language == "en" else pattern
    return re.sub(pattern, lambda found: words[found[0]] if chance.random() < 0.7 else found[0], question)


def _thinned(question: str, language: Language, chance: random.Random) -> str:
    """Some words (Chinese: characters) left out here and there: what remains must do."""
    joint, loss = (" ", 0.15) if language == "en" else ("", 0.1)
    parts = question.split(" ") if joint else list(question)
    return joint.join(part for part in parts if chance.random() > loss) or question


def _cased(question: str, chance: random.Random) -> str:
    kind = chance.random()
    if kind < 0.42:
        return question[:1].upper() + question[1:]
    if kind < 0.66:
        return question.lower()
    return question.upper() if kind < 0.63 else question


def _spaced(question: str, chance: random.Random) -> str:
    """Chinese with or without a space beside Latin words, which may be in any case."""
    if chance.random() < 0.4:
        question = re.sub(r"(?<=[\u4e00-\u9fff])(?=[A-Za-z0-9!/-])", " ", question)
        question = re.sub(r"(?<=[A-Za-z0-9])(?=[\u4e00-\u9fff])", " ", question)
    return question.lower() if chance.random() < 0.12 else question


def _mistyped(question: str, language: Language, chance: random.Random) -> str:
    """One character lost, doubled or swapped, or (English) a word lost."""
    if len(question) < 6:
        return question
    if language == "en" and chance.random() < 0.4:
        words = question.split(" ")
        del words[chance.randrange(len(words))]
        return " ".join(words) or question
    at = chance.randrange(1, len(question) - 1)
    kind = chance.randrange(3)
    if kind == 0:
        return question[:at] + question[at + 1 :]
    if kind == 1:
        return question[:at] + question[at] + question[at:]
    return question[: at - 1] + question[at] + question[at - 1] + question[at + 1 :]
