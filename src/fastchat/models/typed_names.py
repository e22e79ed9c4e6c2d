"""Names of tokens in text that somebody typed: found in linear time, and kept from becoming tokens. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import pairwise
from os.path import commonprefix


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """A pattern for the longest of `names` at a place; without names it never matches.

    What names have in common is compared once: one after the other, 256 of Llama 3's would hold every thread of the
    process for a second and more while a text is searched that is full of their beginnings.
    """
    return re.compile(_branches(set(names) - {""}) or "(?!)")


def cut_names(names: re.Pattern[str] | None, text: str) -> list[str]:
    """The text in pieces, cut behind the first character of each match, so that no tokenizer finds the name."""
    cuts = [0]
    while names is not None and (match := names.search(text, cuts[-1])):  # from there: names may overlap
        cuts.append(match.start() + 1)
    return [text[begin:end] for begin, end in pairwise([*cuts, len(text)])]


def _branches(names: Collection[str]) -> str:
    """The pattern of names that go on from one place; "" is the end of one."""
    rests: dict[str, list[str]] = {}
    for name in sorted(filter(None, names)):
        rests.setdefault(name[0], []).append(name)
    branches = []
    for alike in rests.values():
        common = commonprefix(alike)  # noqa: RUF071 - of characters, which is what is wanted
        branches.append(re.escape(common) + _branches([name[len(common) :] for name in alike]))
    if not branches or (len(branches) == 1 and "" not in names):
        return "".join(branches)
    return f"(?:{'|'.join(branches)}){'?' if '' in names else ''}"
