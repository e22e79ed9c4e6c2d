"""Names of tokens in text that somebody typed: found in linear time, and kept from becoming tokens. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of `names` at a place; without names it never matches.

    What names have in common is compared once: one after the other, 256 of Llama 3's would hold every thread of the
    process for a second and more while a text is searched that is full of their beginnings.
    """
    return re.compile(_branches(set(names) - {""}) or "(?!)")


def cut_names(names: re.Pattern[str] | None, text: str) -> list[str]:
    """The text in pieces, cut behind the first character of each match, so that no tokenizer finds the name."""
    cuts = [match.start() + 1 for match in names.finditer(text)] if names is not None else []
    return [text[begin:end] for begin, end in pairwise([0, *cuts, len(text)])]


def _branches(names: Collection[str]) -> str:
    """The pattern of names that go on from one place; "" is the end of one."""
    rests: dict[str, list[str]] = {}
    for name in sorted(filter(None, names)):
        rests.setdefault(name[0], []).append(name[1:])
    branches = [re.escape(first) + _branches(following) for first, following in rests.items()]
    if not branches or (len(branches) == 1 and "" not in names):
        return "".join(branches)
    return f"(?:{'|'.join(branches)}){'?' if '' in names else ''}"
