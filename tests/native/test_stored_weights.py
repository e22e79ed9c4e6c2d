"""Weights quantized in C++ have the bits that torch gives them."""

import pytest
import torch

from fastchat.errors import CheckpointError
from fastchat.models.quantize import quantize_int4, quantize_int8
from fastchat.models.stored_form import GROUP_SIZES
from fastchat.native.stored_weights import can_store

CPU = torch.device("cpu")
QUANTIZERS = {
    "int8": lambda source: quantize_int8(source, CPU),
    **{f"int4 {size}": lambda source, size=size: quantize_int4(source, size, CPU) for size in GROUP_SIZES},
}


def random_weight(num_rows, num_inputs, dtype=torch.float32):
    """Rows of very different size, one of zeros, and zeros here and there."""
    generator = torch.Generator().manual_seed(num_rows * num_inputs)
    weight = torch.randn(num_rows, num_inputs, generator=generator) * torch.logspace(-9, 3, num_rows)[:, None]
    weight[:, ::7] = 0
    weight[num_rows // 2] = 0
    return weight.to(dtype)


def by_torch(quantize, weight):
    """The kernels read rows in order alone."""
    source = weight.t().contiguous().t()
    assert not can_store(source, source)
    return quantize(source)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (9, 64), (33, 333), (64, 896)], ids=str)
def test_every_level_gives_the_same_bits(form, num_threads, shape, dtype, quantize):
    weight = random_weight(*shape, dtype)
    assert can_store(weight, weight) == (form != "torch")
    for found, expected in zip(quantize(weight), by_torch(quantize, weight), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=QUANTIZERS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_what_is_not_a_finite_number_is_refused(form, place, value, quantize):
    weight = random_weight(4, 100)
    weight[2, place] = value
    with pytest.raises(CheckpointError, match="not finite"):
        quantize(weight)
