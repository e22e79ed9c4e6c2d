"""Products of activations with quantized weights as Triton kernels, for CUDA: y = x W^T + bias.

Import it only where `accelerator.has_triton` says so. The stored forms are those of `torch_products`. A weight is read
once, as it is held, and becomes a number of the activations' type in registers; sums are float32. Activations are not
quantized, for any number of rows, so what a row gives does not depend on how many are beside it but for the rounding of
the sums. T rows, K inputs, N outputs. Tile shapes are chosen by what fits into shared memory; they were not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchat.native.torch_products import UNIT
from fastchat.native.triton_dot import dot, must_widen


@dataclass(frozen=True, slots=True)
class _Tile:
    """Rows and outputs that one program computes. Few rows: many small programs, all reading weights."""

    num_rows: int
    num_outputs: int
    num_warps: int


TILES = {16: _Tile(16, 16, 2), 64: _Tile(64, 64, 4)}
LARGE_TILE = _Tile(128, 128, 8)
"""The tile for up to so many rows, and for all above."""
MAX_SIDE_FLOAT32, MAX_SIDE_INT4 = 32, 64
"""Of a tile: float32 rows take twice the shared memory, int4's scales some more; a small GPU has 99 KiB of it."""
NUM_INPUTS = 128
"""Inputs taken at a time, whatever the tile: sums are in the same order for every number of rows."""


def multiply_int8(rows: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (T, K), weight int8 (N, K), scales (N,) -> (T, N) of the type of the rows."""
    rows, output, tile, grid = _prepare(rows, weight, LARGE_TILE.num_rows)
    _multiply_int8[grid](
        rows,
        weight,
        scales,
        scales if bias is None else bias,
        output,
        *rows.shape,
        len(weight),
        has_bias=bias is not None,
        rows_per_tile=tile.num_rows,
        outputs_per_tile=tile.num_outputs,
        inputs_at_once=NUM_INPUTS,
        is_wide=must_widen(rows),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    return output


def multiply_int4(rows: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows (T, K), packed uint8 (N, K' / 2), scales (N, K' / G) -> (T, N) of the type of the rows."""
    rows, output, tile, grid = _prepare(rows, packed, MAX_SIDE_INT4)
    _multiply_int4[grid](
        rows,
        packed,
        scales,
        scales if bias is None else bias,
        output,
        *rows.shape,
        *packed.shape,
        scales.shape[1],
        has_bias=bias is not None,
        group_size=packed.shape[1] * 2 // scales.shape[1],
        half_unit=UNIT // 2,
        rows_per_tile=tile.num_rows,
        outputs_per_tile=tile.num_outputs,
        bytes_at_once=NUM_INPUTS // 2,
        is_wide=must_widen(rows),
        num_warps=tile.num_warps,
        num_stages=2,
    )
    return output


def _prepare(rows: Tensor, weight: Tensor, max_side: int) -> tuple[Tensor, Tensor, _Tile, tuple[int, int]]:
    assert weight.is_contiguous()
    tile = next((tile for most, tile in TILES.items() if len(rows) <= most), LARGE_TILE)
    if rows.dtype == torch.float32:
        max_side = MAX_SIDE_FLOAT32
    tile = _Tile(min(tile.num_rows, max_side), min(tile.num_outputs, max_side), tile.num_warps)
    grid = (triton.cdiv(len(weight), tile.num_outputs), triton.cdiv(len(rows), tile.num_rows))
    return rows.contiguous(), rows.new_empty((len(rows), len(weight))), tile, grid


@triton.jit
def _multiply_int8(
    rows,
    weight,
    scales,
    bias,
    output,
    num_rows,
    num_inputs,
    num_outputs,
    has_bias: tl.constexpr,
    rows_per_tile: tl.constexpr,
    outputs_per_tile: tl.constexpr,
    inputs_at_once: tl.constexpr,
    is_wide: tl.constexpr,
):
    column = tl.program_id(0) * outputs_per_tile + tl.arange(0, outputs_per_tile)
    row = tl.program_id(1) * rows_per_tile + tl.arange(0, rows_per_tile)
    is_column, is_row = column < num_outputs, row < num_rows
    row_at = rows + row.to(tl.int64)[:, None] * num_inputs
    weight_at = weight + column.to(tl.int64)[:, None] * num_inputs
    sums = tl.zeros((rows_per_tile, outputs_per_tile), tl.float32)
    for begin in range(0, num_inputs, inputs_at_once):
        at = begin + tl.arange(0, inputs_at_once)
        is_input = at < num_inputs
        values = tl.load(row_at + at[None, :], mask=is_row[:, None] & is_input[None, :], other=0.0)
        codes = tl.load(weight_at + at[None, :], mask=is_column[:, None] & is_input[None, :], other=0)
        sums += dot(values, tl.trans(codes.to(tl.float32).to(values.dtype)), is_wide)
    sums *= tl.load(scales + column, mask=is_column, other=0.0)[None, :]
    if has_bias:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = output + row.to(tl.int64)[:, None] * num_outputs + column[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _multiply_int4(
    rows,
    packed,
    scales,
    bias,
    output,
    num_rows,
    num_inputs,
    num_outputs,
    bytes_per_output,
    groups_per_output,
    has_bias: tl.constexpr,
    group_size: tl.constexpr,
    half_unit: tl.constexpr,
    rows_per_tile: tl.constexpr,
    outputs_per_tile: tl.constexpr,
    bytes_at_once: tl.constexpr,
    is_wide: tl.constexpr,
):
    column = tl.program_id(0) * outputs_per_tile + tl.arange(0, outputs_per_tile)
    row = tl.program_id(1) * rows_per_tile + tl.arange(0, rows_per_tile)
    is_column, is_row = column < num_outputs, row < num_rows
    row_at = rows + row.to(tl.int64)[:, None] * num_inputs
    packed_at = packed + column.to(tl.int64)[:, None] * bytes_per_output
    scale_at = scales + column.to(tl.int64)[:, None] * groups_per_output
    sums = tl.zeros((rows_per_tile, outputs_per_tile), tl.float32)
    for begin in range(0, bytes_per_output, bytes_at_once):
        byte = begin + tl.arange(0, bytes_at_once)
        is_byte = is_column[:, None] & (byte < bytes_per_output)[None, :]
        codes = tl.load(packed_at + byte[None, :], mask=is_byte, other=0)
        for half in tl.static_range(2):
            # Byte i of a unit holds the unit's input i in its low half, and input i + half a unit in its high one.
            at = byte // half_unit * (2 * half_unit) + half * half_unit + byte % half_unit
            is_input = is_row[:, None] & (at < num_inputs)[None, :]
            values = tl.load(row_at + at[None, :], mask=is_input, other=0.0)
            scale = tl.load(scale_at + (at // group_size)[None, :], mask=is_byte, other=0.0)
            numbers = ((codes >> (4 * half)) & 15).to(tl.float32) - 8.0
            sums += dot(values, tl.trans((numbers * scale).to(values.dtype)), is_wide)
    if has_bias:
        sums += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    target = output + row.to(tl.int64)[:, None] * num_outputs + column[None, :]
    tl.store(target, sums.to(output.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])
