"""What a folder is and what loading it will take, from its small files and the headers of its weights. Torch-free.

What it refuses, `Checkpoint.open`, the tokenizer, the chat format and `find_weight_files` refuse: the loader's own
checks, in its order. Only tensors' names and shapes are left to the loading itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.footprint import Footprint
from fastchat.models.interface import ChatFormat, ChatMessage, SamplingDefaults, Tokenizer
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.tokenizer import load_tokenizer

EXAMPLE = ChatMessage("user", "…")


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """The prompt format and its marks; `example` is a prompt as the model reads it, None where there is no format."""

    name: str
    source: str
    roles: tuple[str, str]
    example: str | None
    stop_strings: tuple[str, ...]
    stop_tokens: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that is known of a checkpoint before it is loaded; `footprint` is what loading it takes."""

    checkpoint: Checkpoint
    footprint: Footprint
    prompt_format: PromptFormat
    sampling_defaults: SamplingDefaults


def inspect_checkpoint(checkpoint: Checkpoint, *, conv_template: str | None = None) -> Inspection:
    """Look at a folder without loading it. Raises `CheckpointError` or `ConfigError` as loading would."""
    tokenizer = load_tokenizer(checkpoint)
    chat_format = load_chat_format(checkpoint, tokenizer, conv_template)
    _ = checkpoint.max_context  # raises where there is none
    return Inspection(
        checkpoint=checkpoint,
        footprint=Footprint.of(checkpoint),
        prompt_format=_prompt_format(tokenizer, chat_format),
        sampling_defaults=load_sampling_defaults(checkpoint),
    )


def _prompt_format(tokenizer: Tokenizer, chat_format: ChatFormat) -> PromptFormat:
    has_format = chat_format.name != "none"
    stop_ids = sorted(tokenizer.eos_token_ids | chat_format.stop_token_ids)
    return PromptFormat(
        name=chat_format.name,
        source=chat_format.source,
        roles=chat_format.roles,
        example=tokenizer.decode(chat_format.render([EXAMPLE]), skip_special_tokens=False) if has_format else None,
        stop_strings=chat_format.stop_strings,
        stop_tokens={token_id: tokenizer.decode([token_id], skip_special_tokens=False) for token_id in stop_ids},
    )
