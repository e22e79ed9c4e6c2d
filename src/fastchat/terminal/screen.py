"""What a session shows and where its input comes from: one interface, one class for each of FastChat's styles.

The conversation goes to standard output, what is said about it to standard error. Every piece of an answer is written
and flushed at once. On a terminal, control characters of an answer are shown and not obeyed.
"""

from __future__ import annotations

import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TextIO

END_OF_MESSAGE = " __END_OF_A_MESSAGE_47582648__\n"
"""FastChat's mark after each input in the programmatic style."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Screen(ABC):
    """The session calls `ask`, then `begin_answer`, `write` for each piece and `end_answer`; `notice` at any time."""

    @abstractmethod
    def ask(self, role: str) -> str:
        """The next input. Raises `EOFError` at its end and `KeyboardInterrupt` on Ctrl-C."""

    @abstractmethod
    def begin_answer(self, role: str) -> None:
        """Show who speaks now."""

    @abstractmethod
    def write(self, text: str) -> None:
        """Show a piece of the answer at once."""

    @abstractmethod
    def end_answer(self) -> None:
        """The answer is over, whole or not."""

    def notice(self, text: str) -> None:
        """Say something about the session, on standard error."""
        sys.stderr.write(f"{visible(text)}\n")
        sys.stderr.flush()

    def replay(self, role: str, text: str) -> None:
        """Show a message of a conversation that was loaded."""
        self.begin_answer(role)
        self.write(text)
        self.end_answer()


class SimpleScreen(Screen):
    """Labels and text, line by line; works on any terminal, and with pipes, where the input is repeated."""

    def __init__(self) -> None:
        self._has_keyboard = sys.stdin.isatty()
        self._shows_on_terminal = sys.stdout.isatty()
        if self._has_keyboard and self._shows_on_terminal:
            _prepare_line_editing()

    def ask(self, role: str) -> str:
        if self._has_keyboard:
            return clean(self._typed(f"{role}: "))
        _write(sys.stdout, f"{role}: ")
        line = sys.stdin.readline()
        if not line:
            _write(sys.stdout, "\n")
            raise EOFError
        text = clean(line.rstrip("\r\n"))
        _write(sys.stdout, f"{text}\n")
        return text

    def _typed(self, prompt: str) -> str:
        """The next line of the keyboard; Ctrl-C drops what stands in it, and raises where there is nothing."""
        while True:
            try:
                return input(prompt)
            except KeyboardInterrupt:
                if not (self._shows_on_terminal and _line_so_far()):
                    raise
                self.notice("")

    def begin_answer(self, role: str) -> None:
        _write(sys.stdout, f"{role}: ")

    def write(self, text: str) -> None:
        _write(sys.stdout, visible(text) if self._shows_on_terminal else text)

    def end_answer(self) -> None:
        _write(sys.stdout, "\n")


class ProgrammaticScreen(Screen):
    """For programs, byte for byte as FastChat's: `[!OP:role]: ` before each message, inputs end with a mark."""

    def ask(self, role: str) -> str:
        text = self._read_message()
        _write(sys.stdout, f"[!OP:{role}]: {text}\n")
        return text

    def begin_answer(self, role: str) -> None:
        _write(sys.stdout, f"[!OP:{role}]: ")

    def write(self, text: str) -> None:
        _write(sys.stdout, text)

    def end_answer(self) -> None:
        _write(sys.stdout, "\n")

    def _read_message(self) -> str:
        lines: list[str] = []
        while line := sys.stdin.readline():
            lines.append(line)
            if line.endswith((END_OF_MESSAGE, END_OF_MESSAGE.rstrip("\n"))):
                return clean("".join(lines).rstrip("\n").removesuffix(END_OF_MESSAGE.rstrip("\n")))
        if "".join(lines).strip():
            self.notice(f"the last input has no {END_OF_MESSAGE.strip()} at its end and was not sent")
        raise EOFError


def make_plain_streams() -> None:
    """Let no character that cannot be read or written end the session: it becomes a replacement sign."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def clean(text: str) -> str:
    """Input without halves of characters, which no tokenizer and no JSON can hold."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def visible(text: str) -> str:
    """`text` with every control character but tabs and line ends as its escape."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def choose_from(screen: Screen, title: str, names: Sequence[str]) -> str:
    """Ask until one of `names` is chosen, by its number or itself. Raises as `Screen.ask`; an empty line is an end."""
    for number, name in enumerate(names, start=1):
        screen.notice(f"{number:3}. {name}")
    while True:
        answer = screen.ask(f"{title} (1-{len(names)})").strip()
        if not answer:
            raise EOFError
        if answer in names:
            return answer
        if answer.isascii() and answer.isdecimal() and 1 <= int(answer) <= len(names):
            return names[int(answer) - 1]
        screen.notice(f"{answer}: not one of them; give a number or a name")


def _prepare_line_editing() -> None:
    """Arrow keys, wide characters and long pastes in `input`; the Tab key stays a tab.

    Said out loud, since otherwise it depends on whether some library imported readline.
    """
    try:
        import readline  # not on every system, and it may write to the terminal when imported
    except ImportError:
        return
    readline.set_completer(None)
    if "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind("tab: self-insert")


def _line_so_far() -> str:
    """What is typed and not sent yet, as far as it can be known."""
    return sys.modules["readline"].get_line_buffer() if "readline" in sys.modules else ""


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()
