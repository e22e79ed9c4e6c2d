"""ChatGLM2's P-tuning v2: keys and values that were trained, in front of every sequence.

    embedding.weight (P, L * 2 * K * D)      P prefix slots, L layers, keys then values, K heads, D head size
    trans.0, trans.2                         with prefix_projection: Linear, Tanh, Linear over the embedding

They are what a layer would have computed for P earlier tokens, but no rotation is applied to them and no position is
theirs: the first token of a prompt is at position 0 still. They do not depend on the text, so they are computed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastchat.errors import CheckpointError
from fastchat.models.adapter_folder import PREFIX_MARK, PrefixFolder
from fastchat.models.weights import open_shard


class PrefixChange:
    """One prefix; it changes no linear."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prefix = (keys, values)
        self.by_module: dict[str, Any] = {}  # Any: never filled

    def __repr__(self) -> str:
        return f"<PrefixChange of {self.num_prefix_slots} slots>"

    @property
    def num_prefix_slots(self) -> int:
        """P."""
        return self.prefix[0].shape[2]

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.prefix)


def load_prefix(folder: PrefixFolder, config: Any, *, dtype: torch.dtype, device: torch.device) -> PrefixChange:
    """Read a prefix for a model with transformers' `config`. Raises `CheckpointError` for one of another model."""
    tensors = _read(folder)
    encoded = _encode(folder, tensors)
    num_layers, num_heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    if encoded.shape[1] != num_layers * 2 * num_heads * head_dim:
        raise CheckpointError(
            f"{folder.path}: its prefix has {encoded.shape[1]} numbers for each slot, but the base takes "
            f"{num_layers * 2 * num_heads * head_dim}; give its own base: --model-path BASE+PREFIX"
        )
    shaped = encoded.view(len(encoded), num_layers, 2, num_heads, head_dim).permute(2, 1, 3, 0, 4)  # (2, L, K, P, D)
    if not torch.isfinite(shaped).all():
        raise CheckpointError(f"{folder.path}: its prefix holds values that are not finite numbers")
    keys, values = shaped.to(device, dtype).contiguous()
    return PrefixChange(keys, values)


def _encode(folder: PrefixFolder, tensors: dict[str, Tensor]) -> Tensor:
    """(P, L * 2 * K * D)."""
    wanted = ["embedding.weight"]
    if folder.has_projection:
        wanted += [f"trans.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")]
    if set(tensors) != set(wanted):
        raise CheckpointError(
            f"{folder.path}: its prefix encoder has {', '.join(sorted(tensors)) or 'no tensors'}, but config.json asks "
            f"for {', '.join(wanted)}; config and weights are of different trainings"
        )
    embedding = tensors["embedding.weight"]
    if embedding.dim() != 2 or len(embedding) != folder.num_slots:
        raise CheckpointError(f"{folder.path}: its prefix has not the {folder.num_slots} slots of pre_seq_len")
    if not folder.has_projection:
        return embedding
    try:
        hidden = torch.tanh(linear(embedding, tensors["trans.0.weight"], tensors["trans.0.bias"]))
        encoded = linear(hidden, tensors["trans.2.weight"], tensors["trans.2.bias"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder.path}: the sizes of its prefix projection do not fit ({error})") from None
    return encoded


def _read(folder: PrefixFolder) -> dict[str, Tensor]:
    """Its tensors in float32, by what comes after `prefix_encoder.`."""
    tensors: dict[str, Tensor] = {}
    for shard in folder.files.shards:
        with open_shard(folder.files, shard) as reader:
            for name in reader.names():
                tensors[name.rpartition(PREFIX_MARK)[2]] = reader.read(name).to(torch.float32, copy=True)
    return tensors
