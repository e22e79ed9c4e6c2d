"""Triton's products against the weight written out; in Triton's interpreter where no GPU is."""

import pytest
import torch

from fastchat.native.torch_products import pack_int4, unpack_int4
from tests.triton_device import DEVICE

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}
SHAPES = [(48, 128), (21, 200)]


@pytest.fixture
def products():
    from fastchat.native import triton_products  # importable only where Triton is

    return triton_products


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def int8_weight(num_outputs, num_inputs):
    """Codes, scales, and what they stand for."""
    codes = (draw(num_outputs, num_inputs) * 40).clamp(-127, 127).to(torch.int8)
    scales = draw(num_outputs).abs() / num_inputs
    return codes, scales, codes.float() * scales[:, None]


def int4_weight(num_outputs, num_inputs, group_size):
    codes = (draw(num_outputs, num_inputs) * 3).clamp(-8, 7).to(torch.int8)
    packed = pack_int4(codes)
    scales = draw(num_outputs, packed.shape[1] * 2 // group_size) / num_inputs
    written = unpack_int4(packed).view(*scales.shape, -1) * scales[:, :, None]
    return packed, scales, written.view(num_outputs, -1)[:, :num_inputs]


def check(multiply, rows, weight, written, bias):
    expected = rows.float() @ written.t() + (0 if bias is None else bias.float())
    on_device = [None if tensor is None else tensor.to(DEVICE) for tensor in (rows, *weight, bias)]
    found = multiply(*on_device)
    assert found.dtype == rows.dtype
    assert (found.cpu().float() - expected).norm() <= TOLERANCE[rows.dtype] * expected.norm()


@pytest.mark.parametrize(("num_rows", "dtype"), [(1, torch.bfloat16), (17, torch.float32), (70, torch.float16)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_int8_product_is_that_of_the_held_weight(products, shape, dtype, num_rows):
    """At every tile, at sizes that fill none, with and without a bias."""
    *weight, written = int8_weight(*shape)
    bias = None if num_rows == 17 else draw(shape[0]).to(dtype)
    check(products.multiply_int8, draw(num_rows, shape[1]).to(dtype), weight, written, bias)


@pytest.mark.parametrize(("num_rows", "dtype"), [(1, torch.bfloat16), (17, torch.float32), (70, torch.float16)])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_int4_product_is_that_of_the_held_weight(products, shape, group_size, dtype, num_rows):
    """The same, for every group size that divides the padded row."""
    if -(-shape[1] // 64) * 64 % group_size:
        pytest.skip("no such group in a row of this size")
    *weight, written = int4_weight(*shape, group_size)
    bias = None if num_rows == 17 else draw(shape[0]).to(dtype)
    check(products.multiply_int4, draw(num_rows, shape[1]).to(dtype), weight, written, bias)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_rows_a_hundred_times_larger_beside_a_row_change_nothing(products, form):
    """Activations have no common scale."""
    *weight, _ = int8_weight(48, 256) if form == "int8" else int4_weight(48, 256, 64)
    multiply = getattr(products, f"multiply_{form}")
    rows, held = draw(3, 256).to(DEVICE), [tensor.to(DEVICE) for tensor in weight]
    crowd = torch.cat((rows, 100 * rows, rows * 0))
    assert torch.equal(multiply(crowd, *held)[:3], multiply(rows, *held))
