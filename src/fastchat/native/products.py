"""Products of activations with weights, y = x W^T + bias: C++ where it can be had, else `torch_products`.

T rows, K inputs, N outputs, G inputs per group; rows are float32, bfloat16 or float16, and so is the result.

    plain  weight (N, K) of the type of the rows, float32 sums
    int8   weight (N, K) int8, scales (N,) float32
    int4   packed (N, K' / 2) uint8, scales (N, K' / G) float32; G is 32 or a multiple of 64

For int8 and int4 the rows are quantized too, each with its own scale; `torch_products` defines the stored forms and the
results. The C++ kernels give a row the same bits alone and in any batch, at any number of threads; int8 results are
those of `torch_products` bit for bit. They read a weight as torch holds it: there is one copy for every row count.
Above `MAX_ROWS` rows torch multiplies plain weights where it has faster instructions than we use.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastchat.native import torch_products
from fastchat.native.build import ELEMENTS, cpu_flags, kernels
from fastchat.native.torch_products import UNIT, pack_int4, quantize_rows, unpack_int4

__all__ = ["multiply", "multiply_int4", "multiply_int8", "pack_int4", "quantize_rows", "unpack_int4"]

MAX_ROWS = 32
"""Up to here our plain products are faster than torch's on every CPU (measured)."""


def multiply(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None) -> Tensor:
    """rows (T, K), weight (N, K), bias (N,) -> (T, N)."""
    library = kernels()
    if library is None or not _can_take(rows, weight, bias) or weight.dtype != rows.dtype or are_for_torch(rows):
        return _keep(linear(rows, weight, bias), out)
    (num_rows, num_inputs), num_outputs = rows.shape, weight.shape[0]
    assert weight.shape[1] == num_inputs
    rows, result = rows.contiguous(), _result(rows, num_outputs, out)
    library.fastchat_multiply(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        weight.data_ptr(),
        _address(bias),
        result.data_ptr(),
        num_rows,
        num_outputs,
        num_inputs,
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
    (num_rows, num_inputs), num_outputs = rows.shape, weight.shape[0]
    assert weight.shape[1] == num_inputs
    assert weight.dtype == torch.int8
    assert scales.numel() == num_outputs
    rows, result = rows.contiguous(), _result(rows, num_outputs, out)
    library.fastchat_multiply_int8(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        weight.data_ptr(),
        _float32_address(scales),
        _address(bias),
        result.data_ptr(),
        num_rows,
        num_outputs,
        num_inputs,
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
    (num_rows, num_inputs), num_outputs = rows.shape, packed.shape[0]
    assert packed.shape[1] * 2 == -(-num_inputs // UNIT) * UNIT
    assert packed.dtype == torch.uint8
    assert scales.shape[0] == num_outputs
    rows, result = rows.contiguous(), _result(rows, num_outputs, out)
    library.fastchat_multiply_int4(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        packed.data_ptr(),
        _float32_address(scales),
        _address(bias),
        result.data_ptr(),
        num_rows,
        num_outputs,
        num_inputs,
        scales.shape[1],
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
        and (bias is None or (bias.dtype == rows.dtype and bias.shape == weight.shape[:1] and bias.is_contiguous()))
        and not (torch.is_grad_enabled() and (rows.requires_grad or weight.requires_grad))
    )


def are_for_torch(rows: Tensor) -> bool:
    """Whether torch multiplies so many rows with a plain weight; then a row's bits depend on their number."""
    if rows.shape[0] <= MAX_ROWS:
        return False
    return "amx_bf16" in cpu_flags() if rows.dtype == torch.bfloat16 else "avx512vnni" not in cpu_flags()


def _result(rows: Tensor, num_outputs: int, out: Tensor | None) -> Tensor:
    if out is None:
        return rows.new_empty((rows.shape[0], num_outputs))
    assert out.shape == (rows.shape[0], num_outputs)
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
