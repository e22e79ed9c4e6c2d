"""Triton's attention against the reference, over random block tables; in Triton's interpreter where no GPU is."""

import random

import pytest
import torch

from fastchat.engine.attention import (
    AttentionStep,
    KVCacheTensors,
    LayerInputs,
    SequenceSpan,
    attend_each,
    attend_triton,
)
from fastchat.engine.paged_step import paged_queries
from tests.triton_device import DEVICE

BLOCK_SIZE, NUM_BLOCKS = 16, 80
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DECODING = [(1, 1), (1, 16), (1, 600)]
CHUNKS = [(6, 6), (37, 90)]


def make_cache(num_kv_heads, head_dim, dtype):
    cache = KVCacheTensors(
        num_layers=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=DEVICE,
    )
    generator = torch.Generator().manual_seed(0)
    for tensor in cache.layer(0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def make_spans(shapes, seed=0):
    """Sequences of (new tokens, context), with blocks drawn at random, none twice."""
    blocks = random.Random(seed).sample(range(NUM_BLOCKS), NUM_BLOCKS)
    spans, start = [], 0
    for num_queries, length in shapes:
        block_ids = [blocks.pop() for _ in range(-(-length // BLOCK_SIZE))]
        index = torch.tensor(block_ids, device=DEVICE)
        spans.append(SequenceSpan(start, num_queries, length, block_ids, None, index))
        start += num_queries
    return spans


def attend(kernel, spans, query, new, cache, window):
    """The kernel's output and the cache afterwards."""
    slots = [
        span.block_ids[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for span in spans
        for place in range(span.context_length - span.num_queries, span.context_length)
    ]
    step = AttentionStep(
        cache=cache,
        kernel=kernel,
        slots=torch.tensor(slots, device=DEVICE),
        spans=spans,
        on_layer=lambda: None,
        paged_queries=paged_queries(spans, BLOCK_SIZE, DEVICE),
    )
    return kernel(LayerInputs(query, *new, *cache.layer(0), query.shape[2] ** -0.5, window), step)


def draw(num_heads, num_tokens, head_dim, dtype, seed):
    """Queries, keys or values as a model hands them over: heads of a packed row. (H, T, D)."""
    packed = torch.randn(num_tokens, num_heads, head_dim, generator=torch.Generator().manual_seed(seed))
    return packed.to(DEVICE, dtype).transpose(0, 1)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "dtype", "window"),
    [
        (4, 2, 64, torch.float32, None),
        (4, 2, 64, torch.float32, 20),
        (3, 1, 96, torch.float32, None),
        (16, 1, 128, torch.bfloat16, None),
        (1, 1, 64, torch.bfloat16, 300),
        (3, 1, 128, torch.float16, None),
    ],
)
def test_tritons_attention_is_the_references(num_heads, num_kv_heads, head_dim, dtype, window):
    """Decoding and chunks in one step, several parts of a long context, groups of heads, windows, every number type."""
    spans = make_spans(DECODING + CHUNKS)
    num_tokens = sum(span.num_queries for span in spans)
    query = draw(num_heads, num_tokens, head_dim, dtype, 1)
    new = [draw(num_kv_heads, num_tokens, head_dim, dtype, seed) for seed in (2, 3)]
    expected, found = (
        attend(kernel, spans, query, new, make_cache(num_kv_heads, head_dim, dtype), window)
        for kernel in (attend_each, attend_triton)
    )
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_sequences_result_does_not_depend_on_its_batch_mates():
    """Bit by bit, for decoding sequences and for chunks."""
    spans = make_spans(DECODING + CHUNKS)
    query = draw(4, sum(span.num_queries for span in spans), 64, torch.float32, 1)
    new = [draw(2, query.shape[1], 64, torch.float32, seed) for seed in (2, 3)]
    together = attend(attend_triton, spans, query, new, make_cache(2, 64, torch.float32), None)
    for span in spans[2:4]:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        own = SequenceSpan(0, span.num_queries, span.context_length, span.block_ids, None, span.block_index)
        own_new = [tensor[:, rows] for tensor in new]
        alone = attend(attend_triton, [own], query[:, rows], own_new, make_cache(2, 64, torch.float32), None)
        assert torch.equal(alone, together[rows])


def test_a_sequence_of_no_tokens_gets_zeros():
    """It fills up a batch of a fixed size."""
    (queries,) = paged_queries(make_spans([(1, 5), (1, 7)]), BLOCK_SIZE, DEVICE)
    queries.lengths[1] = 0
    keys, values = make_cache(1, 64, torch.float32).layer(0)
    step = AttentionStep(
        cache=make_cache(1, 64, torch.float32),
        kernel=attend_triton,
        slots=torch.tensor([0, 1], device=DEVICE),
        spans=[],
        on_layer=lambda: None,
        paged_queries=(queries,),
    )
    query, new = draw(2, 2, 64, torch.float32, 1), draw(1, 2, 64, torch.float32, 2)
    output = attend_triton(LayerInputs(query, new, new, keys, values, 0.1, None), step)
    assert output[0].all()
    assert not output[1].any()
