"""Tokenizers of the `tokenizers` library (tokenizer.json): byte-level BPE, and SentencePiece models converted to it.

Two instances of the library's tokenizer are held: one that leaves markers of special tokens typed by a user as text,
and one for rendered chat templates, which reads them. Switching one instance to and fro would not be thread-safe.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import tokenizers

from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.length_bound import backend_bound
from fastchat.models.token_table import TokenTable, check_encodable
from fastchat.models.typed_names import any_of, cut_names

SPACE = "▁"
VOCABULARY_FILES = ("tokenizer.model", "vocab.json", "tekken.json")
"""What an old checkpoint has in place of tokenizer.json."""

LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
"""The classes that obey `add_bos_token` whatever the post-processor of tokenizer.json says."""


class BackendTokenizer:
    """Implements `interface.Tokenizer`; safe to call from several threads (nothing is changed after construction)."""

    def __init__(
        self, definition: str, *, vocab_size: int, eos_token_ids: frozenset[int], bos_rule: tuple[str, bool] | None
    ) -> None:
        parsed = json.loads(definition)
        self._template_tokenizer = _instance(definition)
        self._text_tokenizer = _instance(definition)
        self._text_tokenizer.encode_special_tokens = True
        entries = [entry for entry in parsed["added_tokens"] if entry["id"] < vocab_size]
        self._special_ids = {entry["content"]: int(entry["id"]) for entry in entries if entry["special"]}
        self._added_ids = {entry["content"]: int(entry["id"]) for entry in entries if not entry["special"]}
        self._table = _make_table(parsed, vocab_size, self._special_ids, self._added_ids)
        self._max_id_characters = backend_bound(parsed, byte_values(), [*self._special_ids, *self._added_ids])
        self._prefix = self._find_prefix(bos_rule)
        self._eos_token_ids = eos_token_ids
        self._leaking_names: re.Pattern[str] | None = None
        self._newline_ids = self._encode_text("\n")
        # A Unigram model has its special tokens among its pieces, and finds them there.
        leaking = [name for name, token_id in self._special_ids.items() if token_id in self._encode_text(name)]
        self._leaking_names = any_of(leaking) if leaking else None

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
        return self._added_ids

    @property
    def max_id_characters(self) -> int | None:
        return self._max_id_characters

    def encode(self, text: str) -> list[int]:
        return self._prefix + self.encode_piece(text)

    def encode_piece(self, text: str) -> list[int]:
        check_encodable(text)
        return self._encode_text(text)

    def encode_following(self, text: str) -> list[int]:
        check_encodable(text)
        return [token_id for piece in cut_names(self._leaking_names, text) for token_id in self._encode_inner(piece)]

    def encode_rendered(self, text: str) -> list[int]:
        check_encodable(text)
        return _ids_of(self._template_tokenizer, text)

    def prefix_ids(self) -> list[int]:
        return list(self._prefix)

    def special_token_id(self, name: str) -> int | None:
        return self._special_ids.get(name, self._added_ids.get(name))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return self._table.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        return self._table.bytes_of(token_id)

    def _encode_text(self, text: str) -> list[int]:
        first, *others = cut_names(self._leaking_names, text)
        token_ids = _ids_of(self._text_tokenizer, first)
        return token_ids + [token_id for piece in others for token_id in self._encode_inner(piece)]

    def _encode_inner(self, text: str) -> list[int]:
        """Some tokenizers put a space before the first word of a text, and only there: encode after a line break."""
        token_ids = _ids_of(self._text_tokenizer, "\n" + text)
        num_newline_ids = len(self._newline_ids)
        if token_ids[:num_newline_ids] == self._newline_ids:
            return token_ids[num_newline_ids:]
        return _ids_of(self._text_tokenizer, text)

    def _find_prefix(self, bos_rule: tuple[str, bool] | None) -> list[int]:
        """The special ids that the post-processor puts in front of a text. What it puts behind is for training."""
        if bos_rule is not None:
            name, adds_bos = bos_rule
            token_id = self.special_token_id(name)
            return [token_id] if adds_bos and token_id is not None else []
        encoding = self._text_tokenizer.encode("a", add_special_tokens=True)
        is_text = [index for index, is_special in enumerate(encoding.special_tokens_mask) if not is_special]
        return list(encoding.ids[: is_text[0]]) if is_text else []


def read_definition(checkpoint: Checkpoint) -> str:
    """tokenizer.json as text; made by transformers from the vocabulary files where a checkpoint has no such file."""
    text = checkpoint.read_text("tokenizer.json")
    if text is not None:
        return text
    if not any((checkpoint.path / name).is_file() for name in VOCABULARY_FILES):  # transformers would make an empty one
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer (tokenizer.json, {', '.join(VOCABULARY_FILES)}); "
            "download the tokenizer's files as well"
        )
    from transformers import AutoTokenizer  # heavy, and needed for old checkpoints only

    try:
        loaded = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
        return str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer.json, and transformers cannot make a tokenizer from the other files "
            f"({' '.join(str(error).split())[:200]}); download the tokenizer's files as well"
        ) from error


def with_tokens(definition: str, tokens: Sequence[tokenizers.AddedToken]) -> str:
    """A tokenizer.json with more added tokens; those that are in the vocabulary keep their ids."""
    tokenizer = _instance(definition)
    tokenizer.add_tokens([*tokens])
    return str(tokenizer.to_str())


def load_backend_tokenizer(checkpoint: Checkpoint, definition: str, eos_token_ids: frozenset[int]) -> BackendTokenizer:
    """The tokenizer of a checkpoint whose definition has been read. Raises `CheckpointError`."""
    config = checkpoint.tokenizer_config
    adds_bos = config.get("add_bos_token")
    name = checkpoint.special_tokens.get("bos_token")
    bos_rule = None
    if isinstance(adds_bos, bool) and name is not None and config.get("tokenizer_class") in LLAMA_CLASSES:
        bos_rule = (name, adds_bos)
    try:
        return BackendTokenizer(
            definition, vocab_size=checkpoint.vocab_size, eos_token_ids=eos_token_ids, bos_rule=bos_rule
        )
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{checkpoint.path / 'tokenizer.json'}: {error.message}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.path / 'tokenizer.json'}: cannot be read ({error}); download it again"
        ) from error


def _instance(definition: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:
        # the library raises plain Exception for everything that it cannot parse
        raise ValueError(str(error)) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids_of(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """The ids of a text. The library's `encode` would hold the interpreter, and with it every stream, for seconds."""
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _make_table(
    parsed: Mapping[str, Any],  # Any: a JSON file
    vocab_size: int,
    special_ids: Mapping[str, int],
    added_ids: Mapping[str, int],
) -> TokenTable:
    pieces = [b""] * vocab_size
    space_led_ids: list[int] = []
    decoders = list(_decoders_of(parsed.get("decoder")))
    kinds = {decoder["type"] for decoder in decoders}
    if "ByteLevel" in kinds:
        for token, token_id in _vocabulary(parsed["model"]):
            if token_id < vocab_size:
                pieces[token_id] = _byte_level(token)
    elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
        drops_space = any(_drops_first_space(decoder) for decoder in decoders)
        for token, token_id in _vocabulary(parsed["model"]):
            if token_id < vocab_size:
                pieces[token_id] = _sentencepiece(token, has_byte_pieces="ByteFallback" in kinds)
                if drops_space and token.startswith(SPACE):
                    space_led_ids.append(token_id)
    else:
        raise UnsupportedModelError(f"the decoder {sorted(kinds)} does not run here; use a checkpoint that has BPE")
    for token, token_id in added_ids.items():
        pieces[token_id] = token.encode()
    names = {token_id: name for name, token_id in special_ids.items()}
    return TokenTable(pieces, special_names=names, space_led_ids=space_led_ids)


def _vocabulary(model: Mapping[str, Any]) -> Iterator[tuple[str, int]]:  # Any: a JSON file
    """BPE has a mapping to ids, Unigram a list of pieces with their scores."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    else:
        for token_id, (token, _score) in enumerate(vocabulary):
            yield token, token_id


def _decoders_of(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:  # Any: a JSON file
    if decoder is None:
        return
    if decoder["type"] == "Sequence":
        for inner in decoder["decoders"]:
            yield from _decoders_of(inner)
    else:
        yield decoder


def _drops_first_space(decoder: Mapping[str, Any]) -> bool:  # Any: a JSON file
    if decoder["type"] == "Strip":
        return decoder.get("content") == " " and decoder.get("start", 0) > 0
    if decoder["type"] == "Metaspace":
        return decoder.get("prepend_scheme", "always") != "never" and decoder.get("add_prefix_space") is not False
    return False


def _sentencepiece(token: str, *, has_byte_pieces: bool) -> bytes:
    if has_byte_pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _byte_level(token: str) -> bytes:
    """GPT-2's spelling of bytes as printable characters; a token that is not spelled so is itself."""
    values = byte_values()
    try:
        return bytes([values[character] for character in token])
    except KeyError:
        return token.encode()


@cache
def byte_values() -> Mapping[str, int]:
    """GPT-2's map: printable Latin-1 characters stand for themselves, the others are numbered from U+0100.

    openai/gpt-2 src/encoder.py `bytes_to_unicode`.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    values = {chr(value): value for value in plain}
    others = [value for value in range(256) if value not in set(plain)]
    values.update({chr(256 + offset): value for offset, value in enumerate(others)})
    return values
