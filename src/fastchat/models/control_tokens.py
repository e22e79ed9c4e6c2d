"""Keeps what users type apart from what a chat template writes. Torch-free.

A template is rendered to text in which names of tokens stand for tokens. Where a user's text holds such a name, it is
wrapped in two marks before rendering; afterwards a name between marks is text, and any other is a token:

    user's text       say <|im_end|>
    rendered          <|im_start|>user⏎say ⟦<|im_end|>⟧<|im_end|>⏎
    ids               [<|im_start|>] "user⏎say <|im_end|>" [<|im_end|>] "⏎"

The marks are two code points that are no characters (U+FDD0 to U+FDEF), chosen so that no text of the request has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fastchat.errors import InvalidRequestError
from fastchat.models.tokenizer import TemplateTokenizer
from fastchat.models.typed_names import any_of, cut_names

NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


class PlainText:
    """Text that is tokenized as text although it may hold the names of tokens that a prompt is built of.

    A tokenizer leaves special tokens alone. One that a checkpoint adds without making it special would be found in any
    text, so its name is cut.
    """

    def __init__(self, tokenizer: TemplateTokenizer, names: Iterable[str]) -> None:
        self.tokenizer = tokenizer
        soft_names = [name for name in names if name in tokenizer.added_tokens]
        self._soft_names = any_of(soft_names) if soft_names else None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, none of which is a token of those names."""
        first, *others = cut_names(self._soft_names, text)
        token_ids = self.tokenizer.encode_piece(first)
        for other in others:
            token_ids += self.tokenizer.encode_following(other)
        return token_ids


class ControlTokens:
    """The tokens that a template may write. `soft_ids` are those that are not special tokens (`<think>`)."""

    def __init__(self, tokenizer: TemplateTokenizer, soft_ids: Mapping[str, int]) -> None:
        self._tokenizer = tokenizer
        self._soft_ids = dict(soft_ids)
        self._ids = {**tokenizer.special_tokens, **self._soft_ids}
        self._special_names = any_of(tokenizer.special_tokens)
        self._all_names = any_of(self._ids)
        self._restarts = _restarts_behind_tokens(tokenizer)

    def occur_in(self, value: Any, *, with_soft: bool = True) -> bool:  # Any: JSON
        """Whether any string of a JSON value holds the name of a token."""
        names = self._all_names if with_soft else self._special_names
        return any(names.search(text) for text in strings_of(value))

    def mark(self, value: Any, marks: str, *, with_soft: bool = True) -> Any:  # Any: JSON
        """A copy of a JSON value with every name of a token wrapped in the two characters of `marks`."""
        if isinstance(value, str):
            names = self._all_names if with_soft else self._special_names
            return names.sub(f"{marks[0]}\\g<0>{marks[1]}", value)
        if isinstance(value, Mapping):
            return {
                self.mark(key, marks, with_soft=with_soft): self.mark(item, marks, with_soft=with_soft)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.mark(item, marks, with_soft=with_soft) for item in value]
        return value

    def encode(self, text: str, marks: str) -> list[int]:
        """The ids of a text that was rendered from marked values."""
        opening, closing = marks[0], marks[1]
        names = self._all_names.pattern
        pattern = re.compile(f"{opening}(?P<typed>{names}){closing}|(?P<token>{names})|[{marks}]")
        token_ids: list[int] = []
        pending = ""
        start = 0
        is_start = True
        for match in pattern.finditer(text):
            pending += text[start : match.start()]
            start = match.end()
            typed, token = match["typed"], match["token"]
            if typed in self._tokenizer.special_tokens:
                pending += typed  # the tokenizer leaves these as text
            elif typed is not None:
                # Not a special token, so the tokenizer would find it in text: cut it.
                token_ids += self._encode_text(pending + typed[:1], is_start=is_start)
                pending, is_start = typed[1:], False
            elif token is not None:
                token_ids += self._encode_text(pending, is_start=is_start)
                token_ids.append(self._ids[token])
                pending, is_start = "", self._restarts
        return token_ids + self._encode_text(pending + text[start:], is_start=is_start)

    def _encode_text(self, text: str, *, is_start: bool) -> list[int]:
        if not text:
            return []
        return self._tokenizer.encode_piece(text) if is_start else self._tokenizer.encode_following(text)


def choose_marks(*values: Any) -> str:  # Any: JSON
    """Two code points that occur in no string of `values`. Raises `InvalidRequestError` where all are taken."""
    used = {character for value in values for text in strings_of(value) for character in text if character >= "\ufdd0"}
    free = [character for character in NONCHARACTERS if character not in used]
    if len(free) < 2:
        raise InvalidRequestError(
            "The messages hold too many code points that are no characters (U+FDD0 to U+FDEF); remove them.",
            param="messages",
            code="invalid_value",
        )
    return free[0] + free[1]


def strings_of(value: Any) -> Iterator[str]:  # Any: JSON
    """Every string in a JSON value, keys of objects included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from strings_of(key)
            yield from strings_of(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def _restarts_behind_tokens(tokenizer: TemplateTokenizer) -> bool:
    """Whether a text begins anew behind a special token, with the space that is put before a first word (Llama 2)."""
    name = next(iter(tokenizer.special_tokens), "")
    return tokenizer.encode_rendered(f"{name}a")[1:] == tokenizer.encode_piece("a")
