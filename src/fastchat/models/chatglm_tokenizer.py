"""The tokenizer of ChatGLM2 and ChatGLM3: a SentencePiece model with special tokens after its last piece. Torch-free.

    ids of the real model   0 .. 64788     pieces (0 <unk>, 1 <s>, 2 </s>, 3-258 single bytes)
                            64789 ..       [MASK] [gMASK] [sMASK] sop eop, then ChatGLM3's role tokens
                            .. 65023       padding rows of the output, which stand for no text

The ids are computed from the vocabulary, so a smaller one works the same way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.length_bound import sentencepiece_bound
from fastchat.models.token_table import TokenTable, check_encodable

MASK_TOKENS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
PREFIX_TOKENS = ("[gMASK]", "sop")
SPACE = "▁"


class ChatGLMTokenizer:
    """Implements `interface.Tokenizer`; safe to call from several threads (SentencePiece's calls change nothing)."""

    def __init__(self, model_file: Path, *, vocab_size: int, eos_token_ids: frozenset[int], has_roles: bool) -> None:
        self._processor = _load_processor(model_file)
        num_pieces = int(self._processor.vocab_size())
        names = MASK_TOKENS + (ROLE_TOKENS if has_roles else ())
        self._special_ids = {name: num_pieces + offset for offset, name in enumerate(names)}
        if num_pieces + len(names) > vocab_size:
            raise CheckpointError(
                f"{model_file}: {num_pieces} pieces and {len(names)} special tokens do not fit the model's "
                f"padded_vocab_size of {vocab_size}; tokenizer and config are of different models"
            )
        for token_id in (self._processor.bos_id(), self._processor.eos_id()):
            if token_id >= 0:
                self._special_ids[self._processor.id_to_piece(token_id)] = token_id
        self._table = _make_table(self._processor, vocab_size, self._special_ids)
        self._max_id_characters = sentencepiece_bound(self._processor.serialized_model_proto(), self._special_ids)
        self._prefix = [self._special_ids[name] for name in PREFIX_TOKENS]
        self._eos_token_ids = eos_token_ids
        self._specials_pattern = re.compile(
            "|".join(re.escape(name) for name in sorted(self._special_ids, key=len, reverse=True))
        )

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Checkpoint, *, eos_token_ids: frozenset[int], has_roles: bool
    ) -> ChatGLMTokenizer:
        """The tokenizer of a checkpoint's `tokenizer.model`."""
        model_file = checkpoint.path / "tokenizer.model"
        if not model_file.is_file():
            raise CheckpointError(f"{model_file}: missing; download the tokenizer's files as well")
        return cls(model_file, vocab_size=checkpoint.vocab_size, eos_token_ids=eos_token_ids, has_roles=has_roles)

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._eos_token_ids

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return self._special_ids

    @property
    def added_tokens(self) -> Mapping[str, int]:
        return {}

    @property
    def max_id_characters(self) -> int | None:
        return self._max_id_characters

    def encode(self, text: str) -> list[int]:
        return self._prefix + self.encode_piece(text)

    def encode_piece(self, text: str) -> list[int]:
        check_encodable(text)
        token_ids: list[int] = self._processor.encode(text)
        return token_ids

    def encode_following(self, text: str) -> list[int]:
        return self.encode_piece(text)

    def encode_rendered(self, text: str) -> list[int]:
        token_ids: list[int] = []
        start = 0
        for match in self._specials_pattern.finditer(text):
            token_ids += self.encode_piece(text[start : match.start()])
            token_ids.append(self._special_ids[match[0]])
            start = match.end()
        return token_ids + self.encode_piece(text[start:])

    def prefix_ids(self) -> list[int]:
        return list(self._prefix)

    def special_token_id(self, name: str) -> int | None:
        return self._special_ids.get(name)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._table.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._table.bytes_of(token_id)


def _load_processor(model_file: Path) -> Any:  # Any: sentencepiece has no types
    import sentencepiece  # only these checkpoints need it

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{model_file}: not a SentencePiece model ({' '.join(str(error).split())}); download it again "
            "(GLM-4's original repository has another tokenizer: use its `-hf` version)"
        ) from None


def _make_table(processor: Any, vocab_size: int, special_ids: Mapping[str, int]) -> TokenTable:  # Any: see above
    pieces: list[bytes] = []
    space_led_ids: list[int] = []
    special_names = {token_id: name for name, token_id in special_ids.items()}
    for token_id in range(processor.vocab_size()):
        piece: str = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            pieces.append(bytes([int(piece[3:5], 16)]))  # <0x0A>
            continue
        if processor.is_unknown(token_id) or processor.is_control(token_id):
            special_names.setdefault(token_id, piece)
        elif piece.startswith(SPACE):
            space_led_ids.append(token_id)
        pieces.append(piece.replace(SPACE, " ").encode())
    pieces += [b""] * (vocab_size - len(pieces))
    return TokenTable(pieces, special_names=special_names, space_led_ids=space_led_ids)
