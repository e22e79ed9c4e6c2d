"""Decode attention against attention written out in float64."""

import pytest
import torch

from fastchat.native import attention

BLOCK_SIZE = 16
LENGTHS = [1, 15, 64, 65, 300, 513, 1100, 1536]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Case:
    """A cache with scattered blocks and one query token per sequence."""

    def __init__(self, dtype, num_heads, num_kv_heads, head_dim, lengths):
        generator = torch.Generator().manual_seed(head_dim)
        num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(0, length, BLOCK_SIZE)] for length in lengths]
        self.lengths = lengths
        self.rows = list(range(1, 2 * len(lengths), 2))
        shape = (num_kv_heads, num_blocks * BLOCK_SIZE, head_dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        packed = torch.randn(2 * len(lengths), num_heads, head_dim, generator=generator) * 2
        self.query = packed.to(dtype).transpose(0, 1)  # as transformers' modules hand it over

    def attend(self, indices, window=None):
        """(len(indices), H, D)"""
        sequences = attention.DecodingSequences.of(
            [self.rows[i] for i in indices],
            [self.lengths[i] for i in indices],
            [self.tables[i] for i in indices],
            BLOCK_SIZE,
        )
        num_heads, num_tokens, head_dim = self.query.shape
        output = torch.full((num_tokens, num_heads, head_dim), 7.0, dtype=self.query.dtype)
        attention.attend(sequences, self.query, self.keys, self.values, output, scaling=0.2, window=window)
        result = output[[self.rows[i] for i in indices]]
        output[[self.rows[i] for i in indices]] = 7.0
        assert (output == 7.0).all(), "rows of others were written"
        return result

    def written_out(self, index, window=None):
        """(H, D) in float64."""
        slots = [self.tables[index][i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(self.lengths[index])]
        slots = slots if window is None else slots[-window:]
        query = self.query[:, self.rows[index]].double().view(len(self.keys), -1, self.keys.shape[2])  # (K, G, D)
        keys, values = self.keys[:, slots].double(), self.values[:, slots].double()
        weights = (query @ keys.transpose(1, 2) * 0.2).softmax(-1)
        return (weights @ values).flatten(0, 1)


@pytest.fixture(autouse=True)
def needs_native(form):
    if form == "torch":
        pytest.skip("torch's kernels are the engine's")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(14, 2, 64), (32, 2, 128), (3, 3, 80), (6, 2, 8), (5, 1, 33)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 70, 600])
def test_attention_equals_attention_written_out(dtype, shape, window):
    """All head sizes and groups, short and long contexts, whole and windowed."""
    case = Case(dtype, *shape, LENGTHS)
    result = case.attend(range(len(LENGTHS)), window)
    for index in range(len(LENGTHS)):
        expected = case.written_out(index, window)
        assert (result[index].double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def test_a_sequence_attends_the_same_alone_and_among_others(num_threads):
    """No bit depends on the batch or on the number of threads."""
    case = Case(torch.bfloat16, 14, 2, 64, LENGTHS)
    together = case.attend(range(len(LENGTHS)))
    for index in range(len(LENGTHS)):
        assert torch.equal(case.attend([index])[0], together[index])
    torch.set_num_threads(1)
    assert torch.equal(case.attend(range(len(LENGTHS))), together)


def test_large_scores_do_not_overflow_and_bad_numbers_are_seen():
    """Scores of thousands give finite results; a query that is not a number gives no number, to itself alone."""
    case = Case(torch.float32, 4, 2, 64, [40, 700])
    case.query *= 1000
    result = case.attend([0, 1])
    assert (result[1].double() - case.written_out(1)).abs().max() <= 1e-3
    case.query[2, case.rows[0]] = float("nan")
    result = case.attend([0, 1])
    assert result[0, 2].isnan().all()
    assert result[0, :2].isfinite().all()
    assert result[1].isfinite().all()
