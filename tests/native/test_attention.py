"""Attention over a paged cache against attention written out in float64."""

import pytest
import torch

from fastchat.native import attention

BLOCK_SIZE = 16
LENGTHS = [1, 15, 64, 65, 300, 513, 1100, 1536]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


class Case:
    """A cache with scattered blocks, and the last `count` tokens of each sequence as queries."""

    def __init__(self, dtype, num_heads, num_kv_heads, head_dim, lengths, count=1):
        generator = torch.Generator().manual_seed(head_dim)
        num_blocks = sum(-(-length // BLOCK_SIZE) for length in lengths) + 3
        order = torch.randperm(num_blocks, generator=generator).tolist()
        self.tables = [[order.pop() for _ in range(0, length, BLOCK_SIZE)] for length in lengths]
        self.lengths = lengths
        self.counts = [min(count, length) for length in lengths]
        self.rows = [1 + index * (count + 1) for index in range(len(lengths))]
        shape = (num_kv_heads, num_blocks * BLOCK_SIZE, head_dim)
        self.keys, self.values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        packed = torch.randn((count + 1) * len(lengths) + 1, num_heads, head_dim, generator=generator) * 2
        self.query = packed.to(dtype).transpose(0, 1)  # as transformers' modules hand it over

    def attend(self, indices, window=None, *, is_prompt=False):
        """One (count, H, D) for each."""
        sequences = [(self.rows[i], self.counts[i], self.lengths[i], self.tables[i], is_prompt) for i in indices]
        num_heads, num_tokens, head_dim = self.query.shape
        output = torch.full((num_tokens, num_heads, head_dim), 7.0, dtype=self.query.dtype)
        # One token in place of all is written, to where it already is.
        slot = self.slots(indices[0])[-1:]
        attention.attend(
            attention.Queries.of(sequences, torch.tensor(slot * num_tokens), BLOCK_SIZE),
            self.query,
            (self.keys[:, slot].expand(-1, num_tokens, -1), self.values[:, slot].expand(-1, num_tokens, -1)),
            (self.keys, self.values),
            output,
            scaling=0.2,
            window=window,
        )
        parts = [slice(self.rows[i], self.rows[i] + self.counts[i]) for i in indices]
        results = [output[part].clone() for part in parts]
        for part in parts:
            output[part] = 7.0
        assert (output == 7.0).all(), "rows of others were written"
        return results

    def slots(self, index):
        return [self.tables[index][i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(self.lengths[index])]

    def written_out(self, index, window=None):
        """(count, H, D) in float64."""
        slots, count = self.slots(index), self.counts[index]
        rows = slice(self.rows[index], self.rows[index] + count)
        query = self.query[:, rows].double().view(len(self.keys), -1, count, self.keys.shape[2])  # (K, G, count, D)
        keys, values = (tensor[:, slots].double().unsqueeze(1) for tensor in (self.keys, self.values))
        places = torch.arange(self.lengths[index])
        own = places[-count:].unsqueeze(1)
        hidden = (places > own) | (places <= own - (window or self.lengths[index]))
        weights = (query @ keys.transpose(2, 3) * 0.2).masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ values).flatten(0, 1).transpose(0, 1)


@pytest.fixture(autouse=True)
def needs_native(form):
    if form == "torch":
        pytest.skip("torch's kernels are the engine's")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(14, 2, 64), (32, 2, 128), (3, 3, 80), (6, 2, 8), (5, 1, 33)], ids=str)
@pytest.mark.parametrize(("window", "count"), [(None, 1), (1, 1), (70, 1), (600, 1), (70, 3), (None, 200), (70, 200)])
def test_attention_equals_attention_written_out(dtype, shape, window, count):
    """All head sizes and groups, short and long contexts, whole and windowed; tokens, drafts and chunks of prompts."""
    case = Case(dtype, *shape, LENGTHS if count == 1 else LENGTHS[2:6], count)
    result = case.attend(range(len(case.lengths)), window)
    for index in range(len(case.lengths)):
        expected = case.written_out(index, window)
        assert (result[index].double() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("count", [1, 150])
def test_a_sequence_attends_the_same_alone_and_among_others(num_threads, count):
    """No bit depends on the batch or on the number of threads."""
    case = Case(torch.bfloat16, 14, 2, 64, LENGTHS, count)
    together = case.attend(range(len(LENGTHS)))
    for index in range(len(LENGTHS)):
        assert torch.equal(case.attend([index])[0], together[index])
    torch.set_num_threads(1)
    assert all(map(torch.equal, case.attend(range(len(LENGTHS))), together))


def test_a_few_tokens_attend_with_the_bits_of_single_ones():
    """A draft that is verified sees what it would see as the next token."""
    case = Case(torch.bfloat16, 14, 2, 64, [300, 700], 4)
    few = case.attend([0, 1])
    case.counts = [1, 1]
    for back in range(4):
        case.rows = [row + 3 - back for row in (1, 6)]
        case.lengths = [300 - back, 700 - back]
        one = case.attend([0, 1])
        assert all(torch.equal(one[i][0], few[i][3 - back]) for i in range(2))


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("size", [1, 3, 8, 9, 64])
def test_a_prompt_attends_the_same_wherever_it_is_cut(size, window):
    """Parts of any length see, bit for bit, what the whole sees."""
    count, length = 150, 300
    case = Case(torch.bfloat16, 14, 2, 64, [length], count)
    (whole,) = case.attend([0], window, is_prompt=True)
    (row,) = case.rows
    parts = []
    for start in range(0, count, size):
        stop = min(count, start + size)
        case.rows, case.counts, case.lengths = [row + start], [stop - start], [length - count + stop]
        parts += case.attend([0], window, is_prompt=True)
    assert torch.equal(torch.cat(parts), whole)


def test_large_scores_do_not_overflow_and_bad_numbers_are_seen():
    """Scores of thousands give finite results; a query that is not a number gives no number, to itself alone."""
    case = Case(torch.float32, 4, 2, 64, [40, 700])
    case.query *= 1000
    result = case.attend([0, 1])
    assert (result[1].double() - case.written_out(1)).abs().max() <= 1e-3
    case.query[2, case.rows[0]] = float("nan")
    result = case.attend([0, 1])
    assert result[0][0, 2].isnan().all()
    assert result[0][0, :2].isfinite().all()
    assert result[1].isfinite().all()
