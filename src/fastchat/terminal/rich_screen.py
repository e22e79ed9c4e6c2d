"""The style `rich`: an edited input line with history and completion of commands, answers as live Markdown.

Needs a terminal on both sides. History is kept in memory only; nothing that was typed is written to disk.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from fastchat.terminal.commands import COMMANDS, FILE_COMMANDS
from fastchat.terminal.screen import Screen, clean, visible

_FENCE = re.compile(r"^ {0,3}(```|~~~)", re.MULTILINE)
_REFRESH_PER_S = 8


class RichScreen(Screen):
    """`is_multiline`: Enter begins a new line and Escape, Enter sends. `has_mouse`: clicks move the cursor."""

    def __init__(self, *, is_multiline: bool = False, has_mouse: bool = False) -> None:
        self._console = Console()
        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            auto_suggest=AutoSuggestFromHistory(),
            completer=CommandCompleter(),
            complete_while_typing=True,
            multiline=is_multiline,
            mouse_support=has_mouse,
            key_bindings=None if is_multiline else _new_line_keys(),
        )
        self._answer: LiveMarkdown | None = None

    def ask(self, role: str) -> str:
        while True:
            try:
                return clean(self._session.prompt([("bold", f"{role}: ")]))
            except KeyboardInterrupt:
                if not self._session.default_buffer.text:
                    raise  # with text in the line, Ctrl-C drops the line alone

    def begin_answer(self, role: str) -> None:
        self._console.print(Text(f"{role}:", style="bold"))
        self._answer = LiveMarkdown(self._console)

    def write(self, text: str) -> None:
        assert self._answer is not None
        self._answer.write(text)

    def end_answer(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None

    def notice(self, text: str) -> None:
        Console(stderr=True).print(Text(visible(text), style="dim"))


class LiveMarkdown:
    """Markdown that grows: what is finished scrolls away as it is, the last paragraph is drawn again and again."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._waiting = ""
        self._live = Live(console=console, refresh_per_second=_REFRESH_PER_S, vertical_overflow="ellipsis")
        self._live.start()

    def write(self, text: str) -> None:
        """Add a piece."""
        self._waiting += visible(text)
        finished, self._waiting = split_finished(self._waiting)
        self._live.update(Markdown(self._waiting))
        if finished.strip():
            self._console.print(Markdown(finished))
            self._console.print()

    def close(self) -> None:
        """Draw the rest, whole."""
        self._live.vertical_overflow = "visible"
        self._live.update(Markdown(self._waiting), refresh=True)
        self._live.stop()


class CommandCompleter(Completer):
    """Completes `!!` to a command, and the name of the file after one."""

    def __init__(self) -> None:
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, rest = text.partition(" ")
        if not text.startswith("!!"):
            return
        if space and command in FILE_COMMANDS:
            yield from self._paths.get_completions(Document(rest), complete_event)
        elif not space:
            for name, meaning in COMMANDS.items():
                if name.startswith(text):
                    yield Completion(name, start_position=-len(text), display_meta=meaning)


def split_finished(text: str) -> tuple[str, str]:
    """Text up to the last blank line that is outside of a code fence, and what follows it."""
    end = text.rfind("\n\n")
    while end >= 0:
        if len(_FENCE.findall(text, 0, end)) % 2 == 0:
            return text[:end], text[end + 2 :]
        end = text.rfind("\n\n", 0, end)
    return "", text


def is_possible() -> bool:
    """Whether keyboard and screen are a terminal that can move its cursor."""
    return sys.stdin.isatty() and sys.stdout.isatty() and not Console().is_dumb_terminal


def _new_line_keys() -> KeyBindings:
    bindings = KeyBindings()

    @bindings.add("escape", "enter")
    def _insert_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline()

    return bindings
