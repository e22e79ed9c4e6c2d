"""The commands that a line may be, as FastChat has them."""

from __future__ import annotations

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


@dataclass(frozen=True, slots=True)
class Command:
    """A line that is no question. `argument` is empty for the commands that take none."""

    name: str
    argument: str = ""


def parse_command(line: str) -> Command | None:
    """The command that a line is, or None; whatever else begins with `!!` is a question."""
    name, _, argument = line.strip().partition(" ")
    if name in FILE_COMMANDS or (name in COMMANDS and not argument):
        return Command(name, argument.strip())
    return None
