"""Products in every form against float64, and against each other."""

import pytest
import torch

from fastchat.native import products, torch_products

SHAPES = [  # rows, inputs, outputs
    (1, 64, 4),
    (1, 896, 131),
    (2, 1, 1),
    (3, 31, 2),
    (5, 100, 33),
    (7, 130, 5),
    (8, 257, 16),
    (33, 192, 40),
    (17, 61, 200),
    (70, 320, 77),
    (300, 2048, 9),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE_ERROR = {torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}
GROUP_SIZES = [32, 64, 128]


def draw(num_rows, num_inputs, num_outputs, dtype):
    generator = torch.Generator().manual_seed(num_rows * num_inputs)
    rows = torch.randn(num_rows, num_inputs, generator=generator)
    rows[num_rows // 2] *= 100
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    bias = torch.randn(num_outputs, generator=generator)
    return rows.to(dtype), weight.to(dtype), bias.to(dtype)


def draw_int8(num_outputs, num_inputs):
    generator = torch.Generator().manual_seed(num_inputs)
    weight = torch.randint(-128, 128, (num_outputs, num_inputs), dtype=torch.int8, generator=generator)
    return weight, torch.rand(num_outputs, generator=generator) / 100


def draw_int4(num_outputs, num_inputs, group_size):
    generator = torch.Generator().manual_seed(num_inputs)
    values = torch.randint(-8, 8, (num_outputs, num_inputs), dtype=torch.int8, generator=generator)
    packed = products.pack_int4(values)
    if packed.shape[1] * 2 % group_size:
        pytest.skip("the inputs are no whole groups")
    return packed, torch.rand(num_outputs, packed.shape[1] * 2 // group_size, generator=generator)


def assert_near(result, expected, dtype):
    """Each row within the type's error of the row's largest value."""
    assert result.dtype == dtype
    expected = expected.double()
    error = (result.double() - expected).abs().amax(dim=1)
    assert (error <= RELATIVE_ERROR[dtype] * (expected.abs().amax(dim=1) + 1e-3)).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_is_the_sum_of_products(form, dtype, shape):
    """Every row count, odd sizes, with and without a bias."""
    rows, weight, bias = draw(*shape, dtype)
    exact = rows.double() @ weight.double().t()
    assert_near(products.multiply(rows, weight), exact, dtype)
    assert_near(products.multiply(rows, weight, bias), exact + bias.double(), dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_products_are_the_same_bits_in_every_form(form, dtype, shape):
    """Whole-number sums are exact, and the two scales are multiplied in one order."""
    _, num_inputs, num_outputs = shape
    rows, _, bias = draw(*shape, dtype)
    weight, scales = draw_int8(num_outputs, num_inputs)
    for added in (None, bias):
        expected = torch_products.multiply_int8(rows, weight, scales, added)
        assert torch.equal(products.multiply_int8(rows, weight, scales, added), expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_int4_products_equal_in_every_form(form, group_size, shape):
    """The groups' sums are exact; only their addition is rounded."""
    _, num_inputs, num_outputs = shape
    rows, _, bias = draw(*shape, torch.float32)
    packed, scales = draw_int4(num_outputs, num_inputs, group_size)
    quantized, row_scales = products.quantize_rows(rows)
    padding = packed.shape[1] * 2 - num_inputs
    values = torch.nn.functional.pad(quantized, (0, padding)).double() * row_scales.double()
    weight = products.unpack_int4(packed).double() * scales.double().repeat_interleave(group_size, dim=1)
    exact = values @ weight.t()
    assert_near(products.multiply_int4(rows, packed, scales), exact, torch.float32)
    assert_near(products.multiply_int4(rows, packed, scales, bias), exact + bias.double(), torch.float32)


def every_product(num_inputs, num_outputs, dtype):
    """(name, function of rows) for the three kinds of weights."""
    _, weight, _ = draw(1, num_inputs, num_outputs, dtype)
    int8 = draw_int8(num_outputs, num_inputs)
    int4 = draw_int4(num_outputs, num_inputs, 64)
    return {
        "plain": lambda rows: products.multiply(rows, weight),
        "int8": lambda rows: products.multiply_int8(rows, *int8),
        "int4": lambda rows: products.multiply_int4(rows, *int4),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_alone_and_among_others(form, num_threads, dtype):
    """No row's bits depend on its batch mates, a hundred times larger or not numbers at all."""
    rows, _, _ = draw(43, 200, 1, dtype)
    rows[4], rows[7, 100], rows[9, 0] = rows[4] * 100, float("inf"), float("nan")
    for name, multiply in every_product(200, 70, dtype).items():
        if name != "int8" and (form == "torch" or (name == "plain" and products.are_for_torch(rows))):
            continue  # torch's float sums are ordered by shape
        together = multiply(rows)
        for index in range(len(rows)):
            alone = multiply(rows[index : index + 1])
            assert torch.equal(together[index : index + 1].nan_to_num(7), alone.nan_to_num(7)), name
        assert not together[7].isfinite().any()
        assert together[9].isnan().all()
        assert together[10].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(19, 64, 33), (20, 33, 1), (41, 450, 16), (213, 130, 47)], ids=str)
def test_many_rows_have_the_bits_of_few(form, num_threads, dtype, sizes):
    """As many as prompts have: tiles and blocks that are not full, panels that are not, and a bias."""
    if form == "torch":
        pytest.skip("torch's float sums are ordered by shape")
    rows, weight, bias = draw(*sizes, dtype)
    int4 = [draw_int4(sizes[2], sizes[1], group_size) for group_size in (32, 64)]
    for multiply in (
        *([] if products.are_for_torch(rows) else [lambda rows: products.multiply(rows, weight, bias)]),
        *(lambda rows, int4=each: products.multiply_int4(rows, *int4, bias) for each in int4),
    ):
        together = multiply(rows)
        for index in range(0, len(rows), 6):
            assert torch.equal(together[index : index + 6], multiply(rows[index : index + 6]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_zeros_and_no_rows(form, dtype):
    """A row of zeros gives zeros; no rows give no rows; rows that lie apart in memory are read rightly."""
    for name, multiply in every_product(128, 9, dtype).items():
        assert torch.equal(multiply(torch.zeros(3, 128, dtype=dtype)), torch.zeros(3, 9, dtype=dtype)), name
        assert multiply(torch.zeros(0, 128, dtype=dtype)).shape == (0, 9)
        wide = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(multiply(wide[:, ::2]), multiply(wide[:, ::2].contiguous())), name


def test_extreme_values_do_not_overflow(form):
    """The largest whole-number sums fit; the smallest and largest rows keep their precision."""
    num_inputs = 20000
    rows = torch.full((2, num_inputs), 1e30)
    rows[1] = 1e-9
    weight = torch.full((3, num_inputs), -128, dtype=torch.int8)
    expected = rows.double().sum(dim=1, keepdim=True) * -128
    for dtype in (torch.float32, torch.bfloat16):
        result = products.multiply_int8(rows.to(dtype), weight, torch.ones(3))
        torch.testing.assert_close(result.double(), expected.expand(2, 3), rtol=1e-2, atol=0)


@pytest.mark.parametrize("num_inputs", [2, 1024, 1025, 20000])
def test_whole_sums_are_exact_on_every_cpu(num_inputs):
    """By whole numbers and by floats; the largest too, which oneDNN cuts off on a CPU without VNNI."""
    generator = torch.Generator().manual_seed(num_inputs)
    rows, weight = (torch.randint(-128, 128, (5, num_inputs), dtype=torch.int8, generator=generator) for _ in range(2))
    rows[0], rows[1], weight[0], weight[1] = 127, -127, -128, 127
    expected = (rows.double() @ weight.double().t()).int()
    assert torch.equal(torch_products.sum_products(rows, weight), expected)
    assert torch.equal(torch_products.sum_products_in_floats(rows, weight), expected)


def test_results_go_where_they_are_told(form):
    """`out` is filled and returned, in every form."""
    rows, weight, _ = draw(3, 64, 5, torch.float32)
    out = torch.empty(3, 5)
    assert products.multiply(rows, weight, out=out) is out
    assert torch.equal(out, products.multiply(rows, weight))
    int8, int4 = draw_int8(5, 64), draw_int4(5, 64, 32)
    assert torch.equal(products.multiply_int8(rows, *int8, out=out), products.multiply_int8(rows, *int8))
    assert torch.equal(products.multiply_int4(rows, *int4, out=out), products.multiply_int4(rows, *int4))


def test_gradients_are_never_lost(form):
    """Where gradients are recorded torch does the work."""
    rows, weight, _ = draw(2, 8, 3, torch.float32)
    weight.requires_grad_()
    products.multiply(rows, weight).sum().backward()
    torch.testing.assert_close(weight.grad, rows.sum(dim=0).expand(3, 8))
