"""What answers must be beside their status, for the rows that say more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any


def joins_to_the_whole(answer: Any) -> None:
    """A stream's text is that of the same request unstreamed, and no delta has half a character."""
    text = "".join(choice["delta"].get("content", "") for chunk in answer.chunks for choice in chunk["choices"])
    whole = answer.again(stream=False).document["choices"][0]["message"]["content"]
    assert text == whole
    assert all("\ufffd" not in json.dumps(chunk, ensure_ascii=False) for chunk in answer.chunks) or "\ufffd" in whole


def is_cut_at(pick: Callable[[str], list[str]]) -> Callable[[Any], None]:
    """Asks again with stop strings that `pick` takes from the answer's text: the text ends before the first of them."""

    def check(answer: Any) -> None:
        text = answer.document["choices"][0]["text"]
        stops = pick(text)
        # The string that is complete first ends the answer; of those complete together the longest.
        ends = [(text.index(stop) + len(stop), -len(stop)) for stop in stops if stop in text]
        end, length = min(ends, default=(len(text), 0))
        cut = answer.again(stop=stops).document["choices"][0]
        assert cut["text"] == text[: end + length]
        assert cut["finish_reason"] == ("stop" if ends else "length")
        streamed = answer.again(stop=stops, stream=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in streamed.chunks) == cut["text"]

    return check


def says_both_counts(answer: Any) -> None:
    """The limit and what was asked."""
    numbers = [int(number) for number in re.findall(r"\d+", answer.error["message"])]
    assert 2048 in numbers, answer.error
    assert max(numbers) > 2048, answer.error


def lists_ignored(*expected: str) -> Callable[[Any], None]:
    """The header names what was not read."""

    def check(answer: Any) -> None:
        assert answer.headers["x-fastchat-ignored"].split(", ")[: len(expected)] == list(expected)

    return check


def ends_by_length(answer: Any) -> None:
    """The context ended what would never have ended."""
    usage = answer.document["usage"]
    assert answer.document["choices"][0]["finish_reason"] == "length"
    assert usage["total_tokens"] == 2048


def is_text_alone(answer: Any) -> None:
    """Nothing in an answer but its text: it is never read as a call of a tool."""
    choice = answer.document["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason", "stop_reason"}
    assert "__import__" in choice["text"]
