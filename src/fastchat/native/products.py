"""Products of activations with weights, y = x W^T + bias: C++ where it can be had, else `torch_products`.

T rows, K inputs, N outputs, G inputs per group; rows are float32, bfloat16 or float16, and so is the result.

    plain  weight (N, K) of the type of the rows, float32 sums
    int8   weight (N, K) int8, scales (N,) float32
    int4   packed (N, K' / 2) uint8, scales (N, K' / G) float32; G is 32 or a multiple of 64

For int8 and int4 the rows are quantized too, each with its own scale; `torch_products` defines the stored forms and the
results. The C++ kernels give a row the same numbers alone and in any batch, at any number of threads; int8 results are
those of `torch_products` bit for bit. They read a weight as torch holds it: there is one copy for every row count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastchat.native import torch_products
from fastchat.native.build import ELEMENTS, cpu_flags, kernels
from fastchat.native.torch_products import UNIT, pack_int4, quantize_rows, unpack_int4

__all__ = ["multiply", "multiply_int4", "multiply_int8", "pack_int4", "quantize_rows", "unpack_int4"]

MAX_ROWS_BESIDE_TILES = 32
"""With matrix tiles (AMX) torch's product is faster above this many rows, where reading the weight no longer counts."""


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """rows (T, K), weight (N, K), bias (N,) -> (T, N)."""
    library = kernels()
    if library is None or not _can_take(rows, weight, bias) or weight.dtype != rows.dtype or _are_for_tiles(rows):
        return _keep(linear(rows, weight, bias), out)
    rows, result = rows.contiguous(), _result(rows, len(weight), out)
    library.fastchat_multiply(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        result.data_ptr(),
        *(len(rows), *weight.shape),
        torch.get_num_threads(),
    )
    return result


def multiply_int8(
    rows: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """rows (T, K) with an int8 weight (N, K), its scales (N,) and bias (N,) -> (T, N)."""
    library = kernels()
    if library is None or not _can_take(rows, weight, bias):
        return _keep(torch_products.multiply_int8(rows, weight, scales, bias), out)
    rows, result = rows.contiguous(), _result(rows, len(weight), out)
    library.fastchat_multiply_int8(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        weight.data_ptr(),
        _float32_address(scales),
        _address(bias),
        result.data_ptr(),
        *(len(rows), *weight.shape),
        torch.get_num_threads(),
    )
    return result


def multiply_int4(
    rows: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """rows (T, K) with a packed int4 weight (N, K' / 2), its scales (N, K' / G) and bias (N,) -> (T, N)."""
    library = kernels()
    group_size = packed.shape[1] * 2 // scales.shape[1]
    if library is None or not _can_take(rows, packed, bias) or (group_size != UNIT // 2 and group_size % UNIT):
        return _keep(torch_products.multiply_int4(rows, packed, scales, bias), out)
    rows, result = rows.contiguous(), _result(rows, len(packed), out)
    library.fastchat_multiply_int4(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        packed.data_ptr(),
        _float32_address(scales),
        _address(bias),
        result.data_ptr(),
        *(*rows.shape[:1], len(packed), rows.shape[1], scales.shape[1]),
        torch.get_num_threads(),
    )
    return result


def _can_take(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels can: they read CPU memory in order, and record nothing for gradients."""
    return (
        rows.dtype in ELEMENTS
        and rows.is_cpu
        and rows.numel() > 0
        and weight.is_cpu
        and weight.is_contiguous()
        and (bias is None or (bias.dtype == rows.dtype and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )


def _are_for_tiles(rows: Tensor) -> bool:
    return rows.shape[0] > MAX_ROWS_BESIDE_TILES and rows.dtype == torch.bfloat16 and "amx_bf16" in cpu_flags()


def _result(rows: Tensor, num_outputs: int, out: Tensor | None) -> Tensor:
    if out is None:
        return rows.new_empty((len(rows), num_outputs))
    assert out.shape == (len(rows), num_outputs)
    assert out.dtype == rows.dtype
    assert out.is_contiguous()
    return out


def _keep(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _float32_address(scales: Tensor) -> int:
    assert scales.dtype == torch.float32
    assert scales.is_contiguous()
    return scales.data_ptr()
