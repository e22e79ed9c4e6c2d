"""LoRA: a linear's output plus a low-rank change of it, for some rows of a batch.

    y = W x + scale * B (A x)        A (r, K), B (N, r)

A file names the linears as its own model's file does: one `query_key_value`, or q, k and v. Here they may be joined
otherwise (`lean.py`), so a change is cut along the rows of B to where those rows are computed.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastchat.errors import CheckpointError
from fastchat.models.adapter_folder import MERGE, AdapterFolder
from fastchat.models.quantized_linear import QuantizedLinear
from fastchat.models.weights import open_shard
from fastchat.native.low_rank import LowRank, UpPiece

_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(\.default)?\.weight")
_TARGET = re.compile(r"model\.layers\.(?P<layer>\d+)\.(self_attn|mlp)\.(?P<leaf>\w+)\.weight")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a linear of a checkpoint is computed: rows [start, start + num_rows) of a module's output."""

    module: str
    start: int
    num_rows: int
    num_inputs: int


class LoraChange:
    """One adapter: what it adds to which module."""

    def __init__(self, by_module: Mapping[str, LowRank]) -> None:
        self.by_module = by_module

    def __repr__(self) -> str:
        return f"<LoraChange of {len(self.by_module)} modules, {self.num_bytes} bytes>"

    @property
    def num_prefix_slots(self) -> int:
        """It has no prefix."""
        return 0

    @property
    def prefix(self) -> None:
        """It has no prefix."""
        return None

    @property
    def num_bytes(self) -> int:
        """What it holds."""
        changes = self.by_module.values()
        tensors = [tensor for each in changes for tensor in (each.down, *(piece.up for piece in each.pieces))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def find_places(model: Any) -> dict[tuple[int, str], Place]:  # Any: a module of transformers
    """Every linear of the decoder's layers, by the number of its layer and its name there."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = [config.num_attention_heads * head_dim, *[config.num_key_value_heads * head_dim] * 2]
    places: dict[tuple[int, str], Place] = {}
    for index, layer in enumerate(model.get_decoder().layers):
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear | QuantizedLinear):
                continue
            leaf = name.rpartition(".")[2]
            halves = [module.out_features // 2] * 2
            joined = {
                "qkv_proj": zip("qkv", heads, strict=True),
                "gate_up_proj": zip(("gate", "up"), halves, strict=True),
            }
            parts = [(f"{part}_proj", size) for part, size in joined.get(leaf, ())]
            start = 0
            for part, size in parts:
                places[index, part] = Place(f"{index}.{name}", start, size, module.in_features)
                start += size
            places[index, leaf] = Place(f"{index}.{name}", 0, module.out_features, module.in_features)
    return places


def load_lora(
    folder: AdapterFolder,
    places: Mapping[tuple[int, str], Place],
    rename: Callable[[str], tuple[str, ...]],
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> LoraChange:
    """Read an adapter for the modules at `places`; `rename` is `Family.rename`. Raises `CheckpointError`."""
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for module, stored_down, stored_up in _read_pairs(folder):
        targets = [_place(folder, places, module, target) for target in rename(f"{module}.weight")]
        rank = len(stored_down)
        _check_shapes(folder, module, targets, stored_down, stored_up)
        up = (stored_up.float() * folder.scale_of(module, rank)).to(device, dtype)
        down = stored_down.to(device, dtype)
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise CheckpointError(f"{folder.path}: {module} holds values that are not finite numbers in {dtype}")
        _add(parts, targets, down, up)
    return LoraChange({name: _joined(own) for name, own in parts.items()})


def _check_shapes(folder: AdapterFolder, module: str, targets: Sequence[Place], down: Tensor, up: Tensor) -> None:
    num_rows, num_inputs = sum(place.num_rows for place in targets), targets[0].num_inputs
    if up.shape != (num_rows, len(down)) or down.shape[1] != num_inputs:
        raise CheckpointError(
            f"{folder.path}: {module} is a change of {up.shape[0]} x {down.shape[1]}, but the base has {num_rows} x "
            f"{num_inputs} there; the adapter is of another model, give its own base: --model-path BASE+ADAPTER"
        )


def _add(
    parts: dict[str, list[tuple[int, Tensor, Tensor]]], targets: Sequence[Place], down: Tensor, up: Tensor
) -> None:
    """Cut `up` to its places; what lies side by side in one module stays whole."""
    sizes = [place.num_rows for place in targets]
    ends = list(itertools.accumulate(sizes))
    runs: list[tuple[Place, int, int]] = []  # the place where it begins, and its rows of `up`
    for place, size, end in zip(targets, sizes, ends, strict=True):
        if runs and runs[-1][0].module == place.module and _end(*runs[-1]) == place.start:
            before, begin, _ = runs.pop()
            runs.append((before, begin, end))
        else:
            runs.append((place, end - size, end))
    for place, begin, end in runs:
        parts.setdefault(place.module, []).append((place.start, down, up[begin:end]))


def _joined(parts: Sequence[tuple[int, Tensor, Tensor]]) -> LowRank:
    """One module's (start, A, B), their A one below the other."""
    downs = [down for _, down, _ in parts]
    firsts = [0, *itertools.accumulate(len(down) for down in downs)]
    return LowRank(
        torch.cat(downs).contiguous(),
        tuple(UpPiece(start, first, up.t().contiguous()) for (start, _, up), first in zip(parts, firsts, strict=False)),
    )


def _end(place: Place, begin: int, end: int) -> int:
    return place.start + end - begin


def _place(folder: AdapterFolder, places: Mapping[tuple[int, str], Place], module: str, target: str) -> Place:
    match = _TARGET.fullmatch(target)
    place = places.get((int(match["layer"]), match["leaf"])) if match is not None else None
    if place is None:
        what = "of the output or the embedding" if match is None else "that the base does not have"
        raise CheckpointError(f"{folder.path}: changes {module}, a module {what}, which does not run here; {MERGE}")
    return place


def _read_pairs(folder: AdapterFolder) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module's name in its own model, A, B) for each module."""
    sides: dict[str, dict[str, Tensor]] = {}
    for shard in folder.files.shards:
        with open_shard(folder.files, shard) as reader:
            for name in reader.names():
                match = _NAME.fullmatch(name)
                if match is None:
                    raise CheckpointError(f"{shard.path}: {_why_not(name)}, which does not run here; {MERGE}")
                tensor = reader.read(name)
                if tensor.dim() != 2 or not tensor.is_floating_point():
                    raise CheckpointError(f"{shard.path}: {name} is not a matrix of numbers; download it again")
                sides.setdefault(match["module"], {})[match["side"]] = tensor.clone()
    if not sides:
        raise CheckpointError(f"{folder.path}: holds no LoRA tensors; download it again")
    for module, pair in sides.items():
        if set(pair) != {"A", "B"}:
            raise CheckpointError(f"{folder.path}: {module} has only one of lora_A and lora_B; download it again")
        yield module, pair["A"], pair["B"]


def _why_not(name: str) -> str:
    if "lora_magnitude_vector" in name:
        return f"{name} belongs to DoRA"
    if "lora_embedding" in name:
        return f"{name} changes an embedding"
    return f"{name} is no LoRA matrix of a linear (trained whole?)"
