"""Linears that hold their weight in a quantized form, in the place of torch's own within transformers' classes.

On a CPU the products are those of `native/products.py`, on CUDA with Triton those of `native/triton_products.py`;
elsewhere they are made of what torch has there. All take the same stored form, and a row's result does not depend on
the rows beside it: activations have a scale per row, or none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from fastchat.models.quantize import dequantize_int4
from fastchat.native.accelerator import runs_triton
from fastchat.native.products import multiply_int4, multiply_int8, quantize_rows
from fastchat.native.torch_products import sum_products

MIN_INTEGER_ROWS = 32
"""CUDA's integer product wants more than 16 rows, and sizes that are multiples of 8."""
INTEGER_MULTIPLE = 8
MAX_UNPACKED_VALUES = 2**24
"""Values of an int4 weight that are floats at one time on an accelerator."""


class QuantizedLinear(nn.Module):
    """What both forms share: the shapes, the bias, and rows out of a batch of any shape."""

    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N), of the type of the inputs."""
        rows = inputs.reshape(-1, self.in_features)
        return self._multiply(rows).view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _multiply(self, rows: Tensor) -> Tensor:
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """`weight` int8 (N, K), `scales` float32 (N,)."""

    form = "int8"

    def __init__(self, weight: Tensor, scales: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.weight = _parameter(weight)
        self.scales = _parameter(scales)

    def _multiply(self, rows: Tensor) -> Tensor:
        if runs_triton(rows.device):
            from fastchat.native import triton_products  # importable only where Triton is

            return triton_products.multiply_int8(rows, self.weight, self.scales, self.bias)
        multiply = multiply_int8 if rows.device.type == "cpu" else multiply_int8_on_device
        return multiply(rows, self.weight, self.scales, self.bias)


class Int4Linear(QuantizedLinear):
    """`packed` uint8 (N, K' / 2), `scales` float32 (N, K' / G)."""

    form = "int4"

    def __init__(self, packed: Tensor, scales: Tensor, bias: nn.Parameter | None, *, in_features: int) -> None:
        super().__init__(in_features, packed.shape[0], bias)
        self.packed = _parameter(packed)
        self.scales = _parameter(scales)

    def _multiply(self, rows: Tensor) -> Tensor:
        if runs_triton(rows.device):
            from fastchat.native import triton_products  # importable only where Triton is

            return triton_products.multiply_int4(rows, self.packed, self.scales, self.bias)
        multiply = multiply_int4 if rows.device.type == "cpu" else multiply_int4_on_device
        return multiply(rows, self.packed, self.scales, self.bias)

    def extra_repr(self) -> str:
        """With the group's size."""
        return f"{super().extra_repr()}, group_size={self.packed.shape[1] * 2 // self.scales.shape[1]}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    """A parameter stays the object that it is: who holds it is asked for by its identity (`shared_tensors.py`)."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)


def multiply_int8_on_device(rows: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """`multiply_int8` by the integer product of an accelerator: sums of whole numbers, so the results are equal."""
    num_rows, num_outputs = len(rows), len(weight)
    quantized, row_scales = quantize_rows(rows)
    quantized = pad(quantized, (0, -rows.shape[1] % INTEGER_MULTIPLE, 0, max(0, MIN_INTEGER_ROWS - num_rows)))
    padding = (-weight.shape[1] % INTEGER_MULTIPLE, -num_outputs % INTEGER_MULTIPLE)
    weight = pad(weight, (0, padding[0], 0, padding[1])) if any(padding) else weight
    sums = sum_products(quantized, weight)[:num_rows, :num_outputs]
    products = sums.float() * row_scales * scales
    return (products if bias is None else products + bias.float()).to(rows.dtype)


def multiply_int4_on_device(
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    max_unpacked_values: int = MAX_UNPACKED_VALUES,
) -> Tensor:
    """The product with the weight as floats, some outputs at a time: activations are not quantized at all."""
    num_padded = packed.shape[1] * 2
    rows = pad(rows, (0, num_padded - rows.shape[1]))
    step = max(1, max_unpacked_values // num_padded)
    parts = [
        linear(rows, dequantize_int4(packed[start : start + step], scales[start : start + step]).to(rows.dtype))
        for start in range(0, len(packed), step)
    ]
    products = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    return products if bias is None else products + bias
