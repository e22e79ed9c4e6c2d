"""The bytes that each token id stands for, and text from them. Torch-free; both kinds of tokenizer decode through it.

A text is the bytes of its ids joined and read as UTF-8; what is no UTF-8 becomes U+FFFD. SentencePiece models write a
space before the first word of a text, which is dropped again when ids are decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fastchat.errors import InvalidRequestError


class TokenTable:
    """Immutable. `special_names` are the ids that have no text of their own, `space_led_ids` those whose leading
    space is dropped at the start of a text."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        special_names: Mapping[int, str],
        space_led_ids: Iterable[int] = (),
    ) -> None:
        self._pieces = [b"" if token_id in special_names else piece for token_id, piece in enumerate(pieces)]
        self._with_specials = list(self._pieces)
        for token_id, name in special_names.items():
            self._with_specials[token_id] = name.encode()
        self._space_led_ids = frozenset(space_led_ids)

    def __len__(self) -> int:
        return len(self._pieces)

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of one id inside a text; none for special tokens and padding rows."""
        self._check(token_id)
        return self._pieces[token_id]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ids. Raises `InvalidRequestError` for an id that the model does not have."""
        pieces = self._pieces if skip_special_tokens else self._with_specials
        for token_id in token_ids:
            self._check(token_id)
        first = next((token_id for token_id in token_ids if pieces[token_id]), None)
        start = 1 if first in self._space_led_ids else 0
        return b"".join(pieces[token_id] for token_id in token_ids)[start:].decode("utf-8", errors="replace")

    def _check(self, token_id: int) -> None:
        if not 0 <= token_id < len(self._pieces):
            raise InvalidRequestError(
                f"Token id {token_id} does not exist; this model's ids are 0 to {len(self._pieces) - 1}.",
                code="invalid_value",
            )


def check_encodable(text: str) -> None:
    """Raise `InvalidRequestError` for half of a surrogate pair, which no tokenizer can read."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"The text holds a lone surrogate (U+{ord(text[error.start]):04X}) at character {error.start}; "
            "send valid Unicode.",
            code="invalid_value",
        ) from None
