"""The commands that a line may be, as FastChat has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

COMMANDS: Mapping[str, str] = {
    "!!exit": "end (so does an empty line)",
    "!!reset": "begin a new conversation",
    "!!remove": "remove the last exchange",
    "!!regen": "answer the last question again",
    "!!save": "FILE: write the conversation to a file",
    "!!load": "FILE: go on with the conversation of a file",
}
FILE_COMMANDS = frozenset({"!!save", "!!load"})

_ONE_WORD = re.compile("!![A-Za-z]+")


@dataclass(frozen=True, slots=True)
class Command:
    """A line that is no question. `argument` is empty for the commands that take none."""

    name: str
    argument: str = ""


def is_unknown_command(line: str) -> bool:
    """Whether a line can only have been meant as a command, and is none: `!!help`, `!!quit`."""
    name = line.strip()
    return name not in COMMANDS and _ONE_WORD.fullmatch(name) is not None


def parse_command(line: str) -> Command | None:
    """The command that a line is, or None."""
    name, _, argument = line.strip().partition(" ")
    if name in FILE_COMMANDS or (name in COMMANDS and not argument):
        return Command(name, argument.strip())
    return None
