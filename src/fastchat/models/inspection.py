"""What a folder is and what loading it will take, from its small files and the headers of its weights. Torch-free.

What it refuses, `Checkpoint.open`, the tokenizer, the chat format and `find_weight_files` refuse: the loader's own
checks, in its order. Only tensors' names and shapes are left to the loading itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastchat.errors import UnsupportedModelError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import ChatFormat, ChatMessage, SamplingDefaults, Tokenizer
from fastchat.models.recognition import recognise
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.stored_tensors import StoredTensor, read_stored_tensors
from fastchat.models.tokenizer import load_tokenizer
from fastchat.models.weight_files import find_weight_files

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""The types that weights may be loaded in, and the bytes of a number."""

EXAMPLE = ChatMessage("user", "…")


@dataclass(frozen=True, slots=True)
class Weights:
    """The files of the weights. Bytes are those on disk; parameters are counted without what is computed anew."""

    layout: str
    num_shards: int
    num_file_bytes: int
    num_parameters: int
    dtypes: tuple[str, ...]


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
    """Everything that is known of a checkpoint before it is loaded. `cache_values_per_token` counts numbers, not bytes.

    It is None where config.json leaves the attention's shape to transformers' defaults.
    """

    checkpoint: Checkpoint
    weights: Weights
    prompt_format: PromptFormat
    sampling_defaults: SamplingDefaults
    declared_dtype: str | None
    cache_values_per_token: int | None

    def weight_bytes(self, dtype: str) -> int:
        """The memory of the weights, loaded as `dtype`."""
        return self.weights.num_parameters * DTYPE_BYTES[dtype]

    def cache_bytes(self, dtype: str, num_tokens: int) -> int | None:
        """The KV cache of that many tokens."""
        values = self.cache_values_per_token
        return None if values is None else values * DTYPE_BYTES[dtype] * num_tokens


def inspect_checkpoint(checkpoint: Checkpoint, *, conv_template: str | None = None) -> Inspection:
    """Look at a folder without loading it. Raises `CheckpointError` or `ConfigError` as loading would."""
    tokenizer = load_tokenizer(checkpoint)
    chat_format = load_chat_format(checkpoint, tokenizer, conv_template)
    declared = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "").removeprefix("torch.")
    _ = checkpoint.max_context  # raises where there is none
    return Inspection(
        checkpoint=checkpoint,
        weights=_weights(checkpoint),
        prompt_format=_prompt_format(tokenizer, chat_format),
        sampling_defaults=load_sampling_defaults(checkpoint),
        declared_dtype=declared or None,
        cache_values_per_token=_cache_values(checkpoint),
    )


def _weights(checkpoint: Checkpoint) -> Weights:
    files = find_weight_files(checkpoint.path)
    tensors = {
        tensor.name: tensor for shard in files.shards for tensor in read_stored_tensors(files.format, shard.path)
    }
    kept = [tensor for tensor in tensors.values() if checkpoint.family.rename(tensor.name)]
    for tensor in kept:
        _refuse_quantized(checkpoint, tensor)
    return Weights(
        layout=files.format,
        num_shards=len(files.shards),
        num_file_bytes=sum(shard.path.stat().st_size for shard in files.shards),
        num_parameters=sum(tensor.num_values for tensor in kept),
        dtypes=tuple(sorted({tensor.dtype for tensor in kept})),
    )


def _refuse_quantized(checkpoint: Checkpoint, tensor: StoredTensor) -> None:
    if not tensor.dtype.startswith(("float", "bfloat")) or tensor.dtype.startswith("float8"):
        raise UnsupportedModelError(
            f"{checkpoint.path}: {tensor.name} is of type {tensor.dtype}: the checkpoint is quantized, which is not "
            "read here; use the original float16 or bfloat16 weights"
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


def _cache_values(checkpoint: Checkpoint) -> int | None:
    """Numbers that one token leaves in the KV cache: K and V of every layer's groups."""
    recognised = recognise(checkpoint)
    options = checkpoint.family.map_config(checkpoint.config, recognised.format_name if recognised else None)
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    layers, heads, hidden = (_count(options.get(name)) for name in names)
    groups = _count(options.get("num_key_value_heads"))
    head_size = _count(options.get("head_dim")) or (hidden // heads if hidden and heads else None)
    return 2 * layers * groups * head_size if layers and groups and head_size else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
