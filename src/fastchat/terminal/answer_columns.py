"""Several answers that come at once: side by side on a terminal, one after the other where the output is read later."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from fastchat.terminal.screen import visible

_REFRESH_PER_S = 8


class LabelledAnswers:
    """The first answer as it comes, the others when those before them are over: `[a] name`, then the text."""

    def __init__(self) -> None:
        self._headings: list[str] = []
        self._waiting: list[str] = []
        self._is_over: list[bool] = []
        self._shown = 0

    def begin(self, headings: Sequence[str]) -> None:
        self._headings = list(headings)
        self._waiting = [""] * len(headings)
        self._is_over = [False] * len(headings)
        self._shown = 0
        self._open_next()

    def write(self, side: int, text: str) -> None:
        if side == self._shown:
            _say(text)
        else:
            self._waiting[side] += text

    def fail(self, side: int, message: str) -> None:
        sys.stderr.write(f"error: {self._headings[side]}: {visible(message)}\n")
        sys.stderr.flush()
        self.finish(side)

    def finish(self, side: int) -> None:
        self._is_over[side] = True
        while self._shown < len(self._headings) and self._is_over[self._shown]:
            self._close_shown()

    def end(self) -> None:
        while self._shown < len(self._headings):
            self._close_shown()

    def _close_shown(self) -> None:
        _say("\n")
        self._shown += 1
        self._open_next()

    def _open_next(self) -> None:
        if self._shown < len(self._headings):
            label = "abcd"[self._shown]
            _say(f"[{label}] {self._headings[self._shown]}\n{self._waiting[self._shown]}")


class LiveColumns:
    """A table with a column for each answer, drawn again as they grow, as Markdown."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._live: Live | None = None
        self._headings: list[str] = []
        self._texts: list[str] = []
        self._failures: dict[int, str] = {}

    def begin(self, headings: Sequence[str]) -> None:
        self._headings = list(headings)
        self._texts = [""] * len(headings)
        self._failures = {}
        self._live = Live(
            console=self._console, refresh_per_second=_REFRESH_PER_S, vertical_overflow="ellipsis", transient=True
        )
        self._live.start()

    def write(self, side: int, text: str) -> None:
        self._texts[side] += visible(text)
        self._draw()

    def fail(self, side: int, message: str) -> None:
        self._failures[side] = visible(message)
        self._draw()

    def finish(self, side: int) -> None:
        """Nothing more to draw."""

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()  # the moving table goes away, and the whole one is printed once
            self._live = None
            self._console.print(self._table())

    def _draw(self) -> None:
        if self._live is not None:
            self._live.update(self._table())

    def _table(self) -> Table:
        table = Table(expand=True)
        for label, heading in zip("abcd", self._headings, strict=False):
            table.add_column(Text(f"[{label}] {heading}"), ratio=1, overflow="fold")
        table.add_row(*map(Markdown, self._texts))
        if self._failures:
            table.add_row(*(Text(self._failures.get(side, ""), style="red") for side in range(len(self._headings))))
        return table


def _say(text: str) -> None:
    sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()
