"""Stop strings: exact, early, linear."""

import time

from hypothesis import given
from hypothesis import strategies as st

from fastchat.api.stop_strings import StopMatcher, StopStrings

LETTERS = st.text("ab", max_size=24)
STOPS = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def expected(text, stops):
    """The rule, by brute force: the first position where a stop string is complete; of those, the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end - len(stop)], stop
    return text, None


def run(pieces, stops, **options):
    matcher = StopMatcher(StopStrings(stops), **options)
    released = []
    for piece in pieces:
        matched = matcher.push(piece)
        released.append(matched.text)
        if matched.stop is not None:
            return released, matched.stop
    return [*released, matcher.finish()], None


@given(st.lists(LETTERS, max_size=6), STOPS)
def test_cut_is_where_a_stop_string_is_complete_first(pieces, stops):
    """However the text is cut into pieces, the released text and the stop string are those of the whole text."""
    released, stop = run(pieces, stops)
    assert ("".join(released), stop) == expected("".join(pieces), stops)


@given(LETTERS, STOPS)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    """After every character, what is held is the longest end of the text that begins a stop string."""
    matcher = StopMatcher(StopStrings(stops))
    released = ""
    for number, character in enumerate(text, start=1):
        matched = matcher.push(character)
        if matched.stop is not None:
            return
        released += matched.text
        held = text[len(released) : number]
        ends = [text[:number][-size:] for size in range(1, number + 1)]
        assert held == max((e for e in ends if any(s.startswith(e) for s in stops)), key=len, default="")


def test_kept_stop_string_ends_the_text():
    """With include_stop_str_in_output the stop string is the last text."""
    assert run(["xaby"], ["ab"], keeps_stop=True) == (["xab"], "ab")


def test_time_is_linear_in_text_and_stop_strings():
    """Text that nearly matches at every place costs no more than other text of its length."""
    stops = StopStrings(["a" * 255 + letter for letter in "bcdefghijklmnopq"])
    matcher = StopMatcher(stops)
    began = time.process_time()
    for _ in range(2000):
        matcher.push("a" * 50)
    assert time.process_time() - began < 1.0
    assert matcher.finish() == "a" * 255
