"""One quantized Linear: rows that do not know of each other, on a CPU and by the operations of an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastchat.models.lean import join_rows
from fastchat.models.quantize import dequantize_int4, dequantize_int8, quantize_int4, quantize_int8
from fastchat.models.quantized_linear import (
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    multiply_int4_on_device,
    multiply_int8_on_device,
)
from fastchat.models.row_blocks import for_row_blocks
from fastchat.models.stored_form import GROUP_SIZES
from fastchat.native import torch_products
from fastchat.native.products import multiply_int4, multiply_int8

CPU = torch.device("cpu")
SHAPES = [(64, 128), (48, 100), (130, 257), (8, 1024)]
FORMS = ["int8", *(f"int4 {size}" for size in GROUP_SIZES)]


def random_weight(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_outputs, num_inputs, generator=generator) / num_inputs**0.5


def random_rows(num_rows: int, num_inputs: int, dtype: Any = torch.float32) -> Tensor:
    return torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_linear(form: str, weight: Tensor, bias: nn.Parameter | None = None) -> QuantizedLinear:
    if form == "int8":
        return Int8Linear(*quantize_int8(weight, CPU), bias)
    return Int4Linear(*quantize_int4(weight, int(form.split()[1]), CPU), bias, in_features=weight.shape[1])


def held_weight(linear: Any) -> Tensor:
    if isinstance(linear, Int8Linear):
        return dequantize_int8(linear.weight, linear.scales)
    return dequantize_int4(linear.packed, linear.scales)[:, : linear.in_features]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_is_bit_equal_alone_and_beside_rows_a_hundred_times_larger(shape: Any, form: str, dtype: Any) -> None:
    bias = nn.Parameter(torch.ones(shape[0], dtype=dtype), requires_grad=False)
    linear = make_linear(form, random_weight(*shape), bias)
    rows = random_rows(41, shape[1], dtype)
    alone = torch.cat([linear(row[None]) for row in rows])
    for scale in (1.0, 100.0):
        crowd = torch.cat((rows[:5] * scale, rows, rows[:3] * scale))
        assert torch.equal(linear(crowd)[5:-3], alone)
    assert torch.equal(linear(rows[None, None])[0, 0], alone)
    assert alone.dtype == dtype


@pytest.mark.parametrize(
    ("form", "bound"), [("int8", 0.009), ("int4 32", 0.083), ("int4 64", 0.092), ("int4 128", 0.099)]
)
def test_rounding_a_weight_costs_what_the_docstring_says(form: str, bound: float) -> None:
    weight = random_weight(256, 4096)
    error = (held_weight(make_linear(form, weight)) - weight).norm() / weight.norm()
    assert 0.9 * bound < error < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_products_in_plain_torch_keep_rows_apart_too(shape: Any, dtype: Any) -> None:
    """What runs where no compiler is."""
    weight, rows = random_weight(*shape), random_rows(41, shape[1], dtype)
    crowd = torch.cat((rows[:5] * 100.0, rows))
    for multiply, stored in (
        (torch_products.multiply_int8, quantize_int8(weight, CPU)),
        (torch_products.multiply_int4, quantize_int4(weight, 32, CPU)),
    ):
        alone = torch.cat([multiply(row[None], *stored) for row in rows])
        assert torch.equal(multiply(crowd, *stored)[5:], alone)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_the_codes_can_say_are_kept_exactly(form: str) -> None:
    """Codes times a scale that is a power of two come back as they were."""
    largest = 127 if form == "int8" else 8
    codes = torch.randint(-largest, largest, (32, 256), generator=torch.Generator().manual_seed(3)).float()
    codes[:, ::32] = -largest
    assert torch.equal(held_weight(make_linear(form, codes / 64)), codes / 64)


@pytest.mark.parametrize("form", FORMS)
def test_quantizing_some_rows_is_quantizing_them_among_others(form: str) -> None:
    """A tensor of queries, keys and values may be cut before or after; half precision is read as it is."""
    weight = random_weight(600, 512).half()
    whole, parts = held_weight(make_linear(form, weight)), []
    for start, end in ((0, 1), (1, 300), (300, 600)):
        parts.append(held_weight(make_linear(form, weight[start:end])))
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_joined_rows_give_the_same_bits(form: str, has_bias: bool) -> None:
    weights = [random_weight(count, 100, seed) for seed, count in enumerate((64, 16, 16))]
    biases = [nn.Parameter(torch.randn(len(each)), requires_grad=False) if has_bias else None for each in weights]
    linears = [make_linear(form, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    rows = random_rows(7, 100)
    apart = torch.cat([linear(rows) for linear in linears], dim=1)
    joined = join_rows(linears)
    assert joined.out_features == 96
    assert torch.equal(joined(rows), apart)


@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_accelerators_int8_product_is_the_cpus(shape: Any, dtype: Any, num_rows: int) -> None:
    """Sums of whole numbers, so the same bits, at sizes that have to be filled up too."""
    weight, scales = quantize_int8(random_weight(*shape), CPU)
    rows = random_rows(num_rows, shape[1], dtype)
    for bias in (None, torch.randn(shape[0]).to(dtype)):
        expected = multiply_int8(rows, weight, scales, bias)
        assert torch.equal(multiply_int8_on_device(rows, weight, scales, bias), expected)


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_accelerators_int4_product_is_that_of_the_held_weight(shape: Any, group_size: int) -> None:
    """In parts as well as whole; a CPU's differs by the rounding of its activations alone."""
    weight = random_weight(*shape)
    linear = make_linear(f"int4 {group_size}", weight)
    assert isinstance(linear, Int4Linear)
    rows = random_rows(9, shape[1])
    bias = torch.randn(shape[0])
    expected = rows @ held_weight(linear).t() + bias
    for num_values in (2**24, 2048):
        found = multiply_int4_on_device(rows, linear.packed, linear.scales, bias, max_unpacked_values=num_values)
        assert torch.allclose(found, expected, atol=1e-5)
    on_cpu = multiply_int4(rows, linear.packed, linear.scales, bias)
    assert (on_cpu - expected).norm() / expected.norm() < 0.02


def test_quantizing_leaves_torchs_threads_as_they_were() -> None:
    """Though a weight has fewer blocks of rows than there are threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        quantize_int8(random_weight(3, 2**17), CPU)
        assert torch.get_num_threads() == 8
    finally:
        torch.set_num_threads(before)


def test_what_a_block_of_rows_raises_comes_out() -> None:
    def fail(rows: slice) -> None:
        raise ValueError(str(rows.start))

    with pytest.raises(ValueError, match="0"):
        for_row_blocks(torch.zeros(64, 2**14), CPU, fail)
