"""A session of comparing: asks, shows the answers side by side, takes a vote, tells the names."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar  # Any: what coroutines send, which is nothing

from fastchat.errors import FastChatError
from fastchat.terminal.comparison import AnswerColumns, Comparison
from fastchat.terminal.screen import Screen

T = TypeVar("T")

VOTES: Mapping[str, str] = {"a": "a", "b": "b", "t": "tie", "x": "both_bad"}
"""What is pressed, and the vote that it is."""
_VOTE_KEYS = "a, b, t (tie) or x (both bad)"
_OTHER_KEYS = "r asks again, n begins a new round, an empty line ends"


class Run(Protocol):
    """Runs a coroutine to its end on the session's event loop."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...


class CompareSession:
    """A person at the keyboard, or a program that asks once. `new_round` makes a round that is not begun."""

    def __init__(self, new_round: Callable[[], Comparison], columns: AnswerColumns, screen: Screen, run: Run) -> None:
        self._new_round = new_round
        self._columns = columns
        self._screen = screen
        self._run = run

    def ask_once(self, question: str, vote: str | None, *, asks_for_vote: bool) -> bool:
        """One turn, and a vote where one is given or asked for; whether all sides answered. Raises what fails."""
        comparison = self._new_round()
        self._run(comparison.ask(question, self._columns))
        if vote is not None:
            self._vote(comparison, vote)
        while asks_for_vote and comparison.can_vote:
            pressed = self._pressed(f"vote {_VOTE_KEYS}; an empty line for none")
            if not pressed:
                break
            if pressed in VOTES:
                self._vote(comparison, VOTES[pressed])
        return comparison.is_complete

    def talk(self) -> None:
        """Round after round, until the input ends."""
        comparison: Comparison | None = self._new_round()
        while comparison is not None and (question := self._asked("user")):
            self._try(comparison.ask(question, self._columns))
            if comparison.is_begun:
                comparison = self._after_turn(comparison)

    def _after_turn(self, comparison: Comparison) -> Comparison | None:
        """What the person wants next: the same round for a further turn, a new one, or None for the end."""
        while True:
            vote = f"vote {_VOTE_KEYS}; " if comparison.can_vote else ""
            go_on = "g goes on, " if comparison.is_complete else ""
            pressed = self._pressed(f"{vote}{go_on}{_OTHER_KEYS}")
            if not pressed:
                return None
            if pressed == "n":
                return self._new_round()
            if pressed == "g" and comparison.is_complete:
                return comparison
            if pressed == "r":
                self._try(comparison.ask_again(self._columns))
            elif pressed in VOTES and comparison.can_vote and self._try_vote(comparison, VOTES[pressed]):
                return self._new_round()

    def _try_vote(self, comparison: Comparison, vote: str) -> bool:
        try:
            self._vote(comparison, vote)
        except FastChatError as error:
            self._screen.notice(f"error: {error.message}")
            return False
        return True

    def _vote(self, comparison: Comparison, vote: str) -> None:
        names = self._run(comparison.vote(vote))
        told = ", ".join(f"{side} was {name}" for side, name in names.items())
        self._screen.begin_answer("vote")
        self._screen.write(f"{vote}; {told}")
        self._screen.end_answer()

    def _try(self, work: Coroutine[Any, Any, None]) -> None:
        """Ask; a failure and Ctrl-C are told in one line, and the session goes on."""
        try:
            self._run(work)
        except KeyboardInterrupt:
            self._screen.notice("stopped")
        except FastChatError as error:
            self._screen.notice(f"error: {error.message}")

    def _pressed(self, question: str) -> str:
        return self._asked(question).lower()

    def _asked(self, role: str) -> str:
        """The next line; empty at the end of the input and on Ctrl-C."""
        try:
            return self._screen.ask(role).strip()
        except (EOFError, KeyboardInterrupt):
            return ""
