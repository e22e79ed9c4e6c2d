"""Products of activations with quantized weights: y = x W^T, in pure torch; what every faster kernel must equal.

Activations are quantized too, to int8, with one scale per row (per token), so that the sums are whole numbers: exact,
in any order, for any number of rows. A row's result therefore never depends on its batch mates. Shapes: T rows,
K inputs, N outputs, G inputs per group.

    int8   weight (N, K) int8, scales (N,) float32                w = weight * scale of its row
    int4   packed (N, K' / 2) uint8, scales (N, K' / G) float32   w = (nibble - 8) * scale of its group

K' is K rounded up to whole units of 64. A unit of 64 inputs is 32 bytes: byte i holds input i in its low nibble and
input 32 + i in its high one, so one 64-byte register has a unit in order after one mask and one shift.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastchat.native.build import cpu_flags

UNIT = 64
MAX_INT8 = 127
MAX_EXACT_INPUTS = 1024
"""So many products of two int8 sum up to 2^24 at most: whole numbers that float32 holds exactly."""
EXACT_INT8 = ("avx512vnni", "avx_vnni")
"""A CPU has one of these where torch's own product of int8 is exact. Without them oneDNN adds two products in 16 bits,
which cuts off what is too large (oneDNN, "Nuances of int8 Computations").
"""
MIN_NONZERO = 1e-12
"""Below this a row counts as all zero: its scale would overflow when inverted."""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(T, K) of any float type -> int8 (T, K), and its scales, float32 (T, 1)."""
    values = rows.float()
    scales = values.abs().amax(dim=1, keepdim=True).clamp_min(MIN_NONZERO) / MAX_INT8
    return torch.round(values / scales).to(torch.int8), scales


def multiply_int8(rows: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, K) with an int8 weight -> (T, N) of the type of `rows`."""
    quantized, row_scales = quantize_rows(rows)
    return _finish(sum_products(quantized, weight).float() * row_scales * scales, bias, rows.dtype)


def sum_products(rows: Tensor, weight: Tensor) -> Tensor:
    """int8 (T, K) with int8 (N, K) -> int32 (T, N), exact wherever the tensors are."""
    if rows.is_cpu and cpu_flags().isdisjoint(EXACT_INT8):
        return sum_products_in_floats(rows, weight)
    return torch._int_mm(rows, weight.t())  # noqa: SLF001 - torch's public name for it is this one


def sum_products_in_floats(rows: Tensor, weight: Tensor) -> Tensor:
    """The same, as products of floats."""
    sums = torch.zeros((len(rows), len(weight)), dtype=torch.int32)
    for start in range(0, weight.shape[1], MAX_EXACT_INPUTS):
        part = slice(start, start + MAX_EXACT_INPUTS)
        sums += (rows[:, part].float() @ weight[:, part].float().t()).int()
    return sums


def multiply_int4(rows: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """(T, K) with a packed int4 weight -> (T, N) of the type of `rows`."""
    num_groups = scales.shape[1]
    quantized, row_scales = quantize_rows(rows)
    padded = pad(quantized, (0, packed.shape[1] * 2 - quantized.shape[1]))
    groups = padded.view(len(rows), num_groups, padded.shape[1] // num_groups).transpose(0, 1)  # (K'/G, T, G)
    weight = unpack_int4(packed).view(len(packed), num_groups, -1).transpose(0, 1)  # (K'/G, N, G)
    # Whole numbers below 2^24 are exact in float32.
    sums = torch.bmm(groups.float(), weight.float().transpose(1, 2))  # (K'/G, T, N)
    total = torch.zeros_like(sums[0])
    for group in range(num_groups):  # torch's own sum adds in another order for another number of rows
        total += sums[group] * scales[:, group]
    return _finish(total * row_scales, bias, rows.dtype)


def pack_int4(values: Tensor) -> Tensor:
    """int8 (N, K) of -8 to 7 -> uint8 (N, K' / 2)."""
    num_rows, num_inputs = values.shape
    padded = pad(values, (0, -num_inputs % UNIT))
    nibbles = (padded + 8).to(torch.uint8).view(num_rows, -1, 2, UNIT // 2)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).view(num_rows, -1)


def unpack_int4(packed: Tensor) -> Tensor:
    """uint8 (N, K' / 2) -> int8 (N, K') of -8 to 7."""
    units = packed.view(len(packed), -1, UNIT // 2)
    both = torch.stack((units & 15, units >> 4), dim=2)
    return both.to(torch.int8).view(len(packed), -1) - 8


def _finish(product: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (product if bias is None else product + bias.float()).to(dtype)
