"""Token ids to text as they come. Torch-free; a worker keeps one for each answer that is streamed.

Each id stands for bytes, so the only state is the start of a character whose end has not come: at most three bytes.
The cost of a token does not depend on how long the answer is.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from fastchat.models.interface import Tokenizer

MAX_INCOMPLETE_BYTES = 3
"""A UTF-8 character has at most four bytes."""


class Detokenizer:
    """Text that continues the text of `prompt_token_ids`: prompt + all pushes + finish == decode(prompt + answer ids).

    Where the prompt's ids end within a character, the prompt's share of that law is its text without the incomplete
    end, and the whole character comes with the answer.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special_tokens = skip_special_tokens
        self._is_at_start = True
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(self._tail_of(prompt_token_ids))

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these ids make certain, possibly ""."""
        return self._decoder.decode(b"".join([self._bytes_of(token_id) for token_id in token_ids]))

    def finish(self) -> str:
        """The rest: an incomplete last character as U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _tail_of(self, prompt_token_ids: Sequence[int]) -> bytes:
        """The last bytes of the prompt, enough to hold a character's start. Notes whether it has any text."""
        tail = b""
        for token_id in reversed(prompt_token_ids):
            tail = self._plain_bytes_of(token_id) + tail
            if len(tail) >= MAX_INCOMPLETE_BYTES:
                break
        self._is_at_start = not tail
        return tail[-MAX_INCOMPLETE_BYTES:]

    def _bytes_of(self, token_id: int) -> bytes:
        piece = self._plain_bytes_of(token_id)
        if not self._is_at_start or not piece:
            return piece
        self._is_at_start = False
        # A SentencePiece tokenizer drops one space before the first word of a text; the piece may have more.
        drops_space = piece.startswith(b" ") and len(self._decode(token_id)) < len(piece.decode(errors="replace"))
        return piece[1:] if drops_space else piece

    def _plain_bytes_of(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id)
        if piece or self._skips_special_tokens:
            return piece
        return self._decode(token_id).encode()

    def _decode(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id], skip_special_tokens=self._skips_special_tokens)
