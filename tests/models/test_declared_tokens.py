"""Tokens that only tokenizer_config.json declares are tokens, as in transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.tokenizer import load_tokenizer
from tests.checkpoints import write_checkpoint
from tests.models.conversations import edit_json

TEXT = "<|im_start|>a<extra>b <think>c</think><|im_end|>"
EXTRA = {"content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
THINK = {**EXTRA, "content": "<think>", "special": True}


def forget_added(folder: Path, names: Sequence[str]) -> None:
    """They stay in the vocabulary."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    edit_json(folder / "tokenizer.json", added_tokens=[each for each in added if each["content"] not in names])


@pytest.mark.parametrize(
    ("declared", "forgotten"),
    [
        ({}, ["<|im_end|>"]),
        ({}, ["<|im_end|>", "<|im_start|>", "<|endoftext|>"]),
        ({"eos_token": "<extra>"}, []),
        ({"eos_token": {**EXTRA, "__type": "AddedToken"}}, []),
        ({"additional_special_tokens": ["<extra>"]}, []),
        ({"extra_special_tokens": {"further": "<extra>"}}, []),
        ({"added_tokens_decoder": {"482": {**EXTRA, "special": True}}}, []),
        ({"added_tokens_decoder": {"482": {**EXTRA, "special": False}}}, []),
        ({"added_tokens_decoder": {"480": THINK}}, []),
    ],
)
def test_declared_tokens_are_those_of_transformers(
    tmp_path: Path, declared: dict[str, Any], forgotten: list[str]
) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    edit_json(folder / "tokenizer_config.json", **declared)
    forget_added(folder, forgotten)
    ours, theirs = load_tokenizer(Checkpoint.open(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    token_ids = ours.encode_rendered(TEXT)
    assert token_ids == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert ours.encode_piece(TEXT) == theirs(TEXT, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for skip in (True, False):
        shown = theirs.decode(token_ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
        assert ours.decode(token_ids, skip_special_tokens=skip) == shown
    assert theirs.eos_token_id in ours.eos_token_ids


@pytest.mark.parametrize(
    "declared",
    [
        {"added_tokens_decoder": ["<extra>"]},
        {"added_tokens_decoder": {"first": EXTRA}},
        {"added_tokens_decoder": {"482": {"special": True}}},
        {"added_tokens_decoder": {"482": {"content": 5}}},
        {"additional_special_tokens": 7},
        {"extra_special_tokens": [7]},
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, declared: dict[str, Any]) -> None:
    folder = write_checkpoint(tmp_path, "llama")
    edit_json(folder / "tokenizer_config.json", **declared)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: its special tokens cannot be read"):
        load_tokenizer(Checkpoint.open(folder))
