"""Tokens that tokenizer_config.json declares and tokenizer.json lacks, or has with other flags: added on load.

transformers does so, and a chat model whose `<|im_end|>` is declared there alone would never end its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint

Entry = Mapping[str, Any]  # Any: a JSON file

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def find_missing_tokens(checkpoint: Checkpoint, added: Sequence[Entry]) -> list[AddedToken]:
    """What is to be added to a tokenizer.json whose `added_tokens` are given, in the order that gives the ids."""
    known = {entry["content"]: _token(entry) for entry in added}
    special_names = [checkpoint.special_tokens[role] for role in ROLES if role in checkpoint.special_tokens]
    missing: dict[str, AddedToken] = {}
    try:
        for token in _numbered(checkpoint):
            token.special |= token.content in special_names
            if repr(token) != repr(known.get(token.content)):
                missing[token.content] = token
        for name in (*special_names, *_further(checkpoint)):
            if name and name not in known:
                missing.setdefault(name, AddedToken(name, special=True))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        file = checkpoint.path / "tokenizer_config.json"
        raise CheckpointError(f"{file}: its special tokens cannot be read ({error}); download it again") from error
    return list(missing.values())


def _numbered(checkpoint: Checkpoint) -> Iterator[AddedToken]:
    entries: Mapping[str, Entry] = checkpoint.tokenizer_config.get("added_tokens_decoder") or {}
    for _, entry in sorted(entries.items(), key=lambda item: int(item[0])):
        yield _token(entry)


def _further(checkpoint: Checkpoint) -> Iterator[str]:
    """Special tokens without a role: a list, or (newer files) names that a template may use."""
    for key in ("additional_special_tokens", "extra_special_tokens"):
        value = checkpoint.tokenizer_config.get(key) or ()
        for each in value.values() if isinstance(value, Mapping) else value:
            yield each["content"] if isinstance(each, Mapping) else each


def _token(entry: Entry) -> AddedToken:
    return AddedToken(entry["content"], **{flag: bool(entry[flag]) for flag in FLAGS if flag in entry})
