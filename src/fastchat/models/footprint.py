"""What loading a checkpoint takes: its parameters by name and shape, from the headers of its weights. Torch-free.

Sizes of the model are read from the shapes rather than from config.json, which may leave them to transformers'
defaults. A tensor that the loader refuses for its type is refused here, in the same words; unknown names and wrong
shapes are left to the loading.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.recognition import recognise
from fastchat.models.stored_form import (
    FLOAT_BYTES,
    INPUT_WEIGHT,
    OUTPUT_WEIGHT,
    FloatName,
    Quantization,
    form_of,
    held_bytes,
)
from fastchat.models.stored_quantization import REMEDY, StoredQuantization, stored_quantization, values_per_number
from fastchat.models.stored_tensors import StoredTensor, read_stored_tensors
from fastchat.models.weight_files import find_weight_files

FLOAT_TYPES = frozenset({"float64", "float32", "float16", "bfloat16"})
SCALE_ENDING = ".weight_scale"


@dataclass(frozen=True, slots=True)
class Footprint:
    """A checkpoint's weights: the files, and every parameter's shape under its name in transformers' class."""

    layout: str
    num_shards: int
    num_file_bytes: int
    dtypes: tuple[str, ...]
    stored_dtype: str
    """Of the first tensor that is not quantized."""
    shapes: Mapping[str, tuple[int, ...]]
    stored: StoredQuantization | None
    quantized_names: frozenset[str]
    """The parameters that are quantized on disk."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Footprint:
        """Read the headers. Raises `CheckpointError` for files that cannot be loaded."""
        files = find_weight_files(checkpoint.path)
        stored = {each.name: each for shard in files.shards for each in read_stored_tensors(files.format, shard.path)}
        scales = {name for name in stored if name.endswith(SCALE_ENDING)}
        kept = {name: each for name, each in stored.items() if name not in scales and checkpoint.family.rename(name)}
        quantized = {name for name, each in kept.items() if each.dtype not in FLOAT_TYPES}
        for name in quantized:
            _check_quantized(checkpoint, kept[name], scales)
        footprint = cls(
            layout=files.format,
            num_shards=len(files.shards),
            num_file_bytes=sum(shard.path.stat().st_size for shard in files.shards),
            dtypes=tuple(sorted({each.dtype for each in kept.values()})),
            stored_dtype=next((each.dtype for name, each in kept.items() if name not in quantized), ""),
            shapes=dict(_parameters(checkpoint, kept)),
            stored=stored_quantization(checkpoint.config),
            quantized_names=frozenset(target for name in quantized for target in checkpoint.family.rename(name)),
        )
        if not (footprint.hidden_size and footprint.kv_values_per_token):
            raise CheckpointError(
                f"{checkpoint.path}: the weights lack the embedding or all attention; download the weight files again"
            )
        return footprint

    @property
    def num_parameters(self) -> int:
        """Numbers that are trained; what is computed anew is not counted, and what is shared once."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def quantized_as(self) -> str | None:
        """What the weights are quantized to on disk."""
        return self.stored.quantization.name if self.stored is not None else None

    @property
    def vocab_size(self) -> int:
        """Rows of the output."""
        return self._size(OUTPUT_WEIGHT if OUTPUT_WEIGHT in self.shapes else INPUT_WEIGHT, 0)

    @property
    def hidden_size(self) -> int:
        """Numbers that go from layer to layer for one token."""
        return self._size(INPUT_WEIGHT, 1)

    @property
    def query_size(self) -> int:
        """Numbers of one token's queries, all heads together."""
        return self._size("self_attn.o_proj.weight", 1)

    @property
    def intermediate_size(self) -> int:
        """Inner numbers of a layer's MLP for one token."""
        return self._size("mlp.down_proj.weight", 1)

    @property
    def kv_values_per_token(self) -> int:
        """Numbers that one token leaves in the KV cache: K and V of every layer."""
        names = ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
        return sum(shape[0] for name, shape in self.shapes.items() if name.endswith(names))

    @property
    def num_layers(self) -> int:
        """Layers with attention."""
        return sum(name.endswith("self_attn.k_proj.weight") for name in self.shapes)

    def weight_bytes(self, dtype: FloatName, quantization: Quantization | None = None) -> Counter[str]:
        """The memory of the weights as they are held, by the name of the form."""
        shapes = self.shapes
        if self.stored is not None and self.stored.covers_all:
            quantization = self.stored.quantization
        if quantization is not None and OUTPUT_WEIGHT not in shapes and INPUT_WEIGHT in shapes:
            shapes = {**shapes, OUTPUT_WEIGHT: shapes[INPUT_WEIGHT]}  # tied: quantized, it is a copy of its own
        held: Counter[str] = Counter()
        for name, shape in shapes.items():
            own = self.stored.quantization if self.stored is not None and name in self.quantized_names else quantization
            form = form_of(name, shape, dtype, own)
            held[form.name] += held_bytes(shape, form)
        return held

    def cache_bytes(self, dtype: FloatName, num_tokens: int) -> int:
        """The KV cache of that many tokens."""
        return self.kv_values_per_token * FLOAT_BYTES[dtype] * num_tokens

    def _size(self, ending: str, dimension: int) -> int:
        sizes = [shape[dimension] for name, shape in self.shapes.items() if name.endswith(ending) and len(shape) == 2]
        return max(sizes, default=0)


def _parameters(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    options: Mapping[str, Any] | None = None  # Any: values of a JSON file
    for tensor in stored.values():
        shape = tensor.shape
        if len(shape) == 2:
            shape = (shape[0], shape[1] * values_per_number(tensor.dtype, checkpoint.config))
        targets = checkpoint.family.rename(tensor.name)
        if len(targets) == 1:
            yield targets[0], shape
            continue
        options = options or _options(checkpoint)
        yield from zip(targets, _split(checkpoint, replace(tensor, shape=shape), options), strict=True)


def _split(checkpoint: Checkpoint, tensor: StoredTensor, options: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The shapes of queries, keys and values that one tensor holds."""
    heads, groups = options["num_attention_heads"], options["num_key_value_heads"]
    rows = [options["head_dim"] * count for count in (heads, groups, groups)]
    if not tensor.shape or sum(rows) != tensor.shape[0]:
        raise CheckpointError(
            f"{checkpoint.path}: {tensor.name} has {tensor.shape[0] if tensor.shape else 'no'} rows, but config.json "
            f"asks for {sum(rows)}; config and weights are of different models, download them again"
        )
    return [(count, *tensor.shape[1:]) for count in rows]


def _options(checkpoint: Checkpoint) -> Mapping[str, Any]:
    recognised = recognise(checkpoint)
    return checkpoint.family.map_config(checkpoint.config, recognised.format_name if recognised else None)


def _check_quantized(checkpoint: Checkpoint, tensor: StoredTensor, scale_names: Collection[str]) -> None:
    """Raise `UnsupportedModelError` for a tensor that is quantized in a way that the loader does not read."""
    is_known = tensor.dtype in ("int8", "uint8") and f"{tensor.name}_scale" in scale_names
    if not is_known or stored_quantization(checkpoint.config) is None:
        raise UnsupportedModelError(
            f"{checkpoint.path}: {tensor.name} is of type {tensor.dtype}: the checkpoint is quantized in a way that is "
            f"not read here; {REMEDY}"
        )
