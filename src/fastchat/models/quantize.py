"""From float weights to the stored forms of `native/products.py`: row by row, each row by itself.

The memory needed is the result and a few blocks of rows. On the CPU C++ does the work where it can be had, in a sixth
of the time, with the same bits.

int8: the scale of a row is its largest value / 127.
int4: for a group, several scales are tried: its largest value (signed, to use the code -8 too, of which there is
no positive one) divided by each of `DIVISORS`. After rounding, the best scale for given codes q is wq / qq (sums of
products; least squares), which leaves the squared error ww - (wq)^2 / qq; the divisor with the least of it wins. On
normally distributed weights this leaves 9.1 % of root mean square error in groups of 64, where largest value / 7 leaves
10.8 %.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastchat.errors import CheckpointError
from fastchat.models.row_blocks import for_row_blocks
from fastchat.models.stored_form import fitting_group, padded_inputs
from fastchat.native.stored_weights import can_store, store_int4, store_int8
from fastchat.native.torch_products import MAX_INT8, MIN_NONZERO, pack_int4, unpack_int4

DIVISORS = (-8.0, -8.8, -7.3)
MIN_INT4, MAX_INT4 = -8, 7


def quantize_int8(source: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, K) of any float type -> int8 (N, K) and scales float32 (N,), both on `device`.

    Raises `CheckpointError` for values that are not finite numbers.
    """
    weight = torch.empty(source.shape, dtype=torch.int8, device=device)
    scales = torch.empty(len(source), device=device)
    if can_store(source, weight):
        store_int8(source, weight, scales)
        check_scales_are_finite(scales)
        return weight, scales

    def quantize(rows: slice) -> None:
        values = _floats(source[rows], device)
        scales[rows] = values.abs().amax(dim=1).clamp_min_(MIN_NONZERO) / MAX_INT8
        weight[rows] = values.div_(scales[rows, None]).round_().to(torch.int8)

    for_row_blocks(source, device, quantize)
    check_scales_are_finite(scales)
    return weight, scales


def quantize_int4(source: Tensor, group_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(N, K) of any float type -> packed uint8 (N, K' / 2) and scales float32 (N, K' / G), both on `device`.

    Raises `CheckpointError` for values that are not finite numbers.
    """
    num_rows, num_inputs = source.shape
    num_padded = padded_inputs(num_inputs)
    group = fitting_group(num_inputs, group_size)
    packed = torch.empty((num_rows, num_padded // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((num_rows, num_padded // group), device=device)
    if can_store(source, packed):
        store_int4(source, packed, scales)
        check_scales_are_finite(scales)
        return packed, scales

    def quantize(rows: slice) -> None:
        values = torch.nn.functional.pad(_floats(source[rows], device), (0, num_padded - num_inputs))
        codes, group_scales = _quantize_groups(values.view(-1, group))
        packed[rows] = pack_int4(codes.view(len(values), num_padded))
        scales[rows] = group_scales.view(len(values), -1)

    for_row_blocks(source, device, quantize)
    check_scales_are_finite(scales)
    return packed, scales


def check_scales_are_finite(scales: Tensor) -> None:
    """Raise `CheckpointError` where a weight held infinity or what is not a number: its scale does so too."""
    if not torch.isfinite(scales).all():
        raise CheckpointError("holds values that are not finite numbers; download this file again")


def dequantize_int8(weight: Tensor, scales: Tensor) -> Tensor:
    """What an int8 weight stands for, float32 (N, K)."""
    return weight.float() * scales[:, None]


def dequantize_int4(packed: Tensor, scales: Tensor) -> Tensor:
    """What a packed weight stands for, float32 (N, K'): inputs past K are zeros."""
    codes = unpack_int4(packed).view(*scales.shape, -1)
    return (codes.float() * scales[:, :, None]).view(len(packed), -1)


def _quantize_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """(num_groups, G) -> codes int8 (num_groups, G) and scales (num_groups,)."""
    lowest, highest = groups.amin(dim=1), groups.amax(dim=1)
    largest = torch.where(-lowest > highest, lowest, highest)
    # A group of zeros gets codes and scale 0.
    inverse = 1.0 / torch.where(largest.abs() < MIN_NONZERO, torch.inf, largest)
    best_gain = torch.full_like(largest, -1.0, dtype=torch.float64)
    best_divisor = torch.zeros_like(largest)
    codes, products = torch.empty_like(groups), torch.empty_like(groups)

    def try_divisor(divisor: float | Tensor) -> tuple[Tensor, Tensor]:
        """wq and qq."""
        torch.mul(groups, (inverse * divisor)[:, None], out=codes)
        codes.round_().clamp_(MIN_INT4, MAX_INT4)
        # In float64 these sums are exact, so that the order of adding does not matter.
        along = torch.mul(groups, codes, out=products).sum(dim=1, dtype=torch.float64)
        return along, torch.mul(codes, codes, out=products).sum(dim=1).clamp_min_(1.0)

    for divisor in DIVISORS:
        along, square = try_divisor(divisor)
        gain = along * along / square
        is_better = gain > best_gain
        best_gain = torch.where(is_better, gain, best_gain)
        best_divisor.masked_fill_(is_better, divisor)
    along, square = try_divisor(best_divisor)
    return codes.to(torch.int8), (along / square).float()


def _floats(rows: Tensor, device: torch.device) -> Tensor:
    """A float32 copy in order, that may be written on."""
    return rows.to(device, torch.float32, copy=True, memory_format=torch.contiguous_format)
