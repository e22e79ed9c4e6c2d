"""The language that a conversation's user writes: a guess from the script alone, the same for the same text always.

Each Chinese, Japanese or Korean character counts as one, and so does each word of any other script; what has most wins.
Code fences and links are left out. Han with some kana is Japanese. Latin words are English unless letters with accents
or the little words of other languages say otherwise. Whatever is none of `LANGUAGES` is `other`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

Language = Literal["zh", "ja", "ko", "ru", "en", "other"]
LANGUAGES: tuple[Language, ...] = get_args(Language)

_MAX_CHARACTERS = 100_000
_MIN_KANA_SHARE = 0.1
_MAX_ACCENTED_SHARE = 0.03

_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+", re.DOTALL)
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_KANA = re.compile(r"[\u3041-\u3096\u30a1-\u30fa]")
_HANGUL = re.compile(r"[\uac00-\ud7a3\u1100-\u11ff\u3130-\u318f]")
_CYRILLIC_WORD = re.compile(r"[\u0400-\u052f]+")
_NOT_RUSSIAN = re.compile(r"[іїєґўјљњћђџѓќѕәғқңөұүһ]", re.IGNORECASE)
_LATIN_WORD = re.compile(r"[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]+(?:['\u2019][A-Za-z]+)?")
_ACCENTED = re.compile(r"[\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff]")
_OTHER_WORD = re.compile(r"[^\W\d_]+")

_ENGLISH = (
    "the a an and or of to in is are was be it this that what how why who when where which do does did can could would"
    " should you i my your for with on at by from as not if then me we please about write tell explain"
)
_FOREIGN = (
    "der das ist und ein eine nicht wie ich sie mit für auf zu le la les des et est une dans que qui pour vous nous"
    " avec sur el los las es en un por con para como qué una del il di che è per non sono gli o os uma não com de"
    " het een van niet ik dat je och att det som är"
)
_ENGLISH_WORDS = frozenset(_ENGLISH.split())
_FOREIGN_WORDS = frozenset(_FOREIGN.split())


def language_of(texts: Sequence[str]) -> Language:
    """The language of what a user wrote, all messages together."""
    text = _CODE.sub(" ", "\n".join(texts)[:_MAX_CHARACTERS])
    num_han, num_kana = len(_HAN.findall(text)), len(_KANA.findall(text))
    latin_words = _LATIN_WORD.findall(text)
    cyrillic_words = _CYRILLIC_WORD.findall(text)
    is_japanese = num_kana > _MIN_KANA_SHARE * (num_han + num_kana)
    counts: dict[Language, int] = {
        "ja" if is_japanese else "zh": num_han + num_kana,
        "ko": len(_HANGUL.findall(text)),
        "other" if _NOT_RUSSIAN.search("".join(cyrillic_words)) else "ru": len(cyrillic_words),
    }
    latin: Language = "en" if _is_english(latin_words) else "other"
    counts[latin] = counts.get(latin, 0) + len(latin_words)
    counts["other"] = counts.get("other", 0) + _num_words_of_other_scripts(text)
    best = max(LANGUAGES, key=lambda language: counts.get(language, 0))
    return best if counts.get(best) else "other"


def _is_english(words: Sequence[str]) -> bool:
    letters = "".join(words)
    if len(_ACCENTED.findall(letters)) > _MAX_ACCENTED_SHARE * len(letters):
        return False
    lowered = [word.lower() for word in words]
    num_foreign = sum(word in _FOREIGN_WORDS for word in lowered)
    return num_foreign <= sum(word in _ENGLISH_WORDS for word in lowered)


def _num_words_of_other_scripts(text: str) -> int:
    for known in (_HAN, _KANA, _HANGUL, _CYRILLIC_WORD, _LATIN_WORD):
        text = known.sub(" ", text)
    return len(_OTHER_WORD.findall(text))
