"""Stop strings: finds the first of several in text that comes in pieces, in linear time.

Text is held back only while it could still become a stop string: exactly the longest end of the text that begins one of
them. That is the state of an Aho-Corasick automaton (Aho, Corasick 1975), so the hold-back costs nothing extra.

    text so far:   | released ................ | held: a beginning of some stop string |
                                               `depth` characters, the automaton's state
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass


class StopStrings:
    """The automaton of some stop strings; never changes, so that all choices of a request share it."""

    def __init__(self, strings: Iterable[str]) -> None:
        self.strings = tuple(dict.fromkeys(strings))
        self._children: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self.depths = [0]
        self.matches: list[str | None] = [None]  # the longest stop string that ends in this state
        for string in self.strings:
            self._insert(string)
        self._link()

    def next_state(self, state: int, character: str) -> int:
        """The state after one more character."""
        children = self._children
        while state and character not in children[state]:
            state = self._fallback[state]
        return children[state].get(character, 0)

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            following = self._children[state].get(character)
            if following is None:
                following = len(self._children)
                self._children[state][character] = following
                self._children.append({})
                self._fallback.append(0)
                self.depths.append(self.depths[state] + 1)
                self.matches.append(None)
            state = following
        self.matches[state] = string

    def _link(self) -> None:
        """Fallbacks level by level: the longest proper end of a state's text that is a state too."""
        queue = deque(self._children[0].values())
        while queue:
            state = queue.popleft()
            for character, child in self._children[state].items():
                self._fallback[child] = self.next_state(self._fallback[state], character)
                if self.matches[child] is None:
                    self.matches[child] = self.matches[self._fallback[child]]
                queue.append(child)


@dataclass(frozen=True, slots=True)
class Matched:
    """What became certain: `text` to release, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Follows one text. The stop string that is complete first ends it; of those complete together, the longest."""

    def __init__(self, stops: StopStrings, *, keeps_stop: bool = False) -> None:
        self._stops = stops
        self._keeps_stop = keeps_stop
        self._held = ""
        self._state = 0

    def push(self, text: str) -> Matched:
        """Take more text; after a match nothing may be pushed any more."""
        if not self._stops.strings or not text:
            return Matched(text)
        unreleased = self._held + text
        state = self._state
        for position in range(len(self._held), len(unreleased)):
            state = self._stops.next_state(state, unreleased[position])
            stop = self._stops.matches[state]
            if stop is not None:
                self._held = ""
                end = position + 1
                return Matched(unreleased[: end if self._keeps_stop else end - len(stop)], stop)
        num_released = len(unreleased) - self._stops.depths[state]
        self._state, self._held = state, unreleased[num_released:]
        return Matched(unreleased[:num_released])

    def finish(self) -> str:
        """The text that was held back in vain."""
        held, self._held, self._state = self._held, "", 0
        return held
