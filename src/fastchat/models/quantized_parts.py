"""Puts quantized Linears in the place of float ones while a checkpoint is read. Called by `weights.py`.

A weight is quantized on the spot, or it is quantized on disk already and comes in two tensors, in any order:

    weight         int8 (N, K)             int8
    weight         int8 (N, K / 2)         int4 of ChatGLM2: input 2i in the high half of a byte, 2i + 1 in the low one,
                                           each a signed number of four bits
    weight         uint8 (N, K' / 2)       int4 as it is held here (`native/products.py`)
    weight_scale   float (N) or (N, K' / G)

Nothing is rounded on the way: codes keep their values, a scale becomes float32, and one scale of a row of int4 is
repeated for each of its groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastchat.errors import CheckpointError
from fastchat.models.quantize import check_scales_are_finite, quantize_int4, quantize_int8
from fastchat.models.quantized_linear import Int4Linear, Int8Linear
from fastchat.models.row_blocks import for_row_blocks
from fastchat.models.shared_tensors import PROCESS_TENSORS
from fastchat.models.stored_form import GROUP_SIZES, StoredForm, fitting_group, padded_inputs
from fastchat.native.products import pack_int4

SCALE_SUFFIX = "_scale"


@dataclass(slots=True)
class _Parts:
    """What has come of one weight."""

    weight: Tensor | None = None
    scales: Tensor | None = None


class QuantizedParts:
    """The quantized weights of one module, by the names of their parameters."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module = module
        self._device = device
        self._parts: dict[str, _Parts] = {}
        self._names: set[str] = set()

    @property
    def held_as(self) -> str | None:
        """`int4` or `int8`, as most of the weights are; None where none is quantized."""
        return min(self._names, default=None)

    def quantize(self, target: str, source: Tensor, form: StoredForm) -> None:
        """Hold a float weight in that form. Raises `CheckpointError` for one that is not all numbers."""
        if form.name == "int4":
            weight, scales = quantize_int4(source, form.group_size, self._device)
        else:
            weight, scales = quantize_int8(source, self._device)
        self._install(target, weight, scales)

    def add_weight(self, target: str, stored: Tensor) -> None:
        """A weight that is quantized on disk. Raises `CheckpointError` for a shape that is none of those above."""
        num_rows, num_inputs = self._linear(target).weight.shape
        parts = self._parts.setdefault(target, _Parts())
        held_shapes = {torch.int8: (num_rows, num_inputs), torch.uint8: (num_rows, padded_inputs(num_inputs) // 2)}
        shape = tuple(stored.shape)
        if shape == held_shapes.get(stored.dtype):
            parts.weight = stored.to(self._device, copy=True)
        elif stored.dtype == torch.int8 and (shape[0], 2 * shape[-1]) == (num_rows, num_inputs):
            parts.weight = _repack(stored, num_inputs, self._device)
        else:
            raise CheckpointError(
                f"a quantized weight of type {str(stored.dtype).removeprefix('torch.')} and shape {shape} is not one "
                f"of {num_rows} x {num_inputs}; config and weights are of different models, download them again"
            )
        self._install_complete(target, parts)

    def add_scales(self, target: str, stored: Tensor) -> None:
        """The scales of such a weight."""
        parts = self._parts.setdefault(target, _Parts())
        parts.scales = stored.to(self._device, torch.float32, copy=True)
        self._install_complete(target, parts)

    def find_incomplete(self) -> str | None:
        """The name of a weight without its scales, or of scales without their weight."""
        for target, parts in sorted(self._parts.items()):
            return target + SCALE_SUFFIX if parts.scales is None else target
        return None

    def _install_complete(self, target: str, parts: _Parts) -> None:
        if parts.weight is None or parts.scales is None:
            return
        scales = parts.scales
        if parts.weight.dtype == torch.uint8 and scales.dim() == 1:
            num_padded = parts.weight.shape[1] * 2
            num_groups = num_padded // fitting_group(num_padded, max(GROUP_SIZES))
            scales = scales[:, None].expand(-1, num_groups).contiguous()
        _check_scales(parts.weight, scales)
        check_scales_are_finite(scales)
        del self._parts[target]
        self._install(target, parts.weight, scales)

    def _install(self, target: str, weight: Tensor, scales: Tensor) -> None:
        old = self._linear(target)
        weight, scales = PROCESS_TENSORS.hold(weight), PROCESS_TENSORS.hold(scales)
        new: Int8Linear | Int4Linear
        if weight.dtype == torch.int8:
            new = Int8Linear(weight, scales, old.bias)
        else:
            new = Int4Linear(weight, scales, old.bias, in_features=old.in_features)
        self._names.add(new.form)
        parent_name, _, leaf = target.removesuffix(".weight").rpartition(".")
        setattr(self._module.get_submodule(parent_name), leaf, new)

    def _linear(self, target: str) -> nn.Linear:
        linear = self._module.get_submodule(target.removesuffix(".weight"))
        assert isinstance(linear, nn.Linear), target
        return linear


def _check_scales(weight: Tensor, scales: Tensor) -> None:
    if weight.dtype == torch.int8:
        is_right = scales.shape == (len(weight),)
    else:
        num_padded = weight.shape[1] * 2
        is_right = (
            scales.dim() == 2
            and len(scales) == len(weight)
            and num_padded in (scales.shape[1] * group_size for group_size in GROUP_SIZES)
        )
    if not is_right:
        raise CheckpointError(
            f"scales of the shape {tuple(scales.shape)} do not fit a quantized weight of the shape "
            f"{tuple(weight.shape)}; the files are of different downloads, download them again"
        )


def _repack(stored: Tensor, num_inputs: int, device: torch.device) -> Tensor:
    """ChatGLM2's packed int4 in the form that is held here."""
    packed = torch.empty((len(stored), padded_inputs(num_inputs) // 2), dtype=torch.uint8, device=device)

    def repack(rows: slice) -> None:
        block = stored[rows].to(device)
        low = (block << 4) >> 4  # int8: the shift back carries the sign
        codes = torch.stack((block >> 4, low), dim=2)  # (n, K / 2, 2)
        packed[rows] = pack_int4(codes.view(len(block), num_inputs))

    for_row_blocks(stored, device, repack)
    return packed
