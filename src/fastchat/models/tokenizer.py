"""Which tokenizer a checkpoint has, and which of its ids end an answer. Torch-free for ChatGLM's checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from fastchat.errors import CheckpointError
from fastchat.models.chatglm_tokenizer import ChatGLMTokenizer
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import Tokenizer
from fastchat.models.recognition import recognise


class TemplateTokenizer(Tokenizer, Protocol):
    """A tokenizer that also reads rendered chat templates, in which the names of special tokens stand for them."""

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """The ids of special tokens by name."""

    @property
    def added_tokens(self) -> Mapping[str, int]:
        """The ids of tokens that were added without being special, such as `<think>`, by name."""

    def encode_rendered(self, text: str) -> list[int]:
        """A rendered template: nothing in front, every name of a special or added token is that token."""

    def encode_following(self, text: str) -> list[int]:
        """Text inside a rendered template after a token: as `encode_piece`, without the space of a text's start."""


def load_tokenizer(checkpoint: Checkpoint) -> TemplateTokenizer:
    """The tokenizer of a checkpoint, from local files, without remote code. Raises `CheckpointError`."""
    if checkpoint.family.name == "chatglm" and not (checkpoint.path / "tokenizer.json").is_file():
        recognised = recognise(checkpoint)
        is_chatglm2 = recognised is not None and recognised.format_name == "chatglm2"
        eos_token_ids = find_eos_token_ids(checkpoint, {})
        return ChatGLMTokenizer.from_checkpoint(checkpoint, eos_token_ids=eos_token_ids, has_roles=not is_chatglm2)
    # Other families need the tokenizers library, which ChatGLM's own tokenizer does not.
    from fastchat.models.backend_tokenizer import load_backend_tokenizer, read_definition, with_tokens
    from fastchat.models.declared_tokens import find_missing_tokens

    definition = read_definition(checkpoint)
    try:
        added = _added_tokens(definition)
        missing = find_missing_tokens(checkpoint, added)
        if missing:
            definition = with_tokens(definition, missing)
            added = _added_tokens(definition)
        ids_by_name = {entry["content"]: int(entry["id"]) for entry in added}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.path / 'tokenizer.json'}: cannot be read ({error}); download it again"
        ) from error
    return load_backend_tokenizer(checkpoint, definition, find_eos_token_ids(checkpoint, ids_by_name))


def _added_tokens(definition: str) -> list[Mapping[str, Any]]:  # Any: a JSON file
    return json.loads(definition).get("added_tokens") or []


def find_eos_token_ids(checkpoint: Checkpoint, ids_by_name: Mapping[str, int]) -> frozenset[int]:
    """The ids that end an answer: those of generation_config.json, else of config.json, and the tokenizer's own.

    generation_config.json is the later and fuller file (chat models list the ends of a turn there); the tokenizer's
    is added because early releases of chat models had the base model's id in both other files.
    """
    declared = checkpoint.generation_config.get("eos_token_id")
    if declared is None:
        declared = checkpoint.config.get("eos_token_id")
    ids = {value for value in (declared if isinstance(declared, list) else [declared]) if isinstance(value, int)}
    own = ids_by_name.get(checkpoint.special_tokens.get("eos_token", ""))
    if own is not None:
        ids.add(own)
    return frozenset(token_id for token_id in ids if 0 <= token_id < checkpoint.vocab_size)
