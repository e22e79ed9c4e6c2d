"""All kernels against attention written out, over adjacent and scattered blocks."""

from pathlib import Path

import pytest
import torch

from fastchat.engine.attention import (
    AttentionStep,
    KVCacheTensors,
    LayerInputs,
    SequenceSpan,
    attend_each,
    attend_native,
    attend_padded,
    native_queries,
)
from fastchat.native import attention as native_attention

NUM_KV_HEADS, NUM_GROUPS, HEAD_DIM, BLOCK_SIZE = 2, 3, 8, 4
SCALING = 0.3


def written_out(query, keys, values, window):
    """query (H, n, D), keys and values (K, L, D) -> (n, H, D), one query and head at a time."""
    num_heads, num_queries, head_dim = query.shape
    length = keys.shape[1]
    output = torch.empty(num_queries, num_heads, head_dim)
    for head in range(num_heads):
        kv_head = head // NUM_GROUPS
        for index in range(num_queries):
            place = length - num_queries + index
            first = 0 if window is None else max(0, place - window + 1)
            scores = keys[kv_head, first : place + 1] @ query[head, index] * SCALING
            output[index, head] = scores.softmax(0) @ values[kv_head, first : place + 1]
    return output


def slots_of(span):
    return [span.block_ids[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE for i in range(span.context_length)]


@pytest.mark.parametrize("kernel", [attend_each, attend_native, attend_padded])
@pytest.mark.parametrize("window", [None, 1, 5, 100])
def test_kernels_equal_attention_written_out(kernel, window):
    """Decoding, whole prompts, chunks; adjacent and scattered blocks; with and without a sliding window."""
    if kernel is attend_native and not native_attention.is_available(torch.float32):
        pytest.skip("the native kernels cannot be built here")
    generator = torch.Generator().manual_seed(0)
    cache = KVCacheTensors(
        num_layers=1,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_blocks=30,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    keys, values = cache.layer(0)
    keys.normal_(generator=generator)
    values.normal_(generator=generator)
    lengths = [
        (1, 1, [0]),
        (1, 9, [1, 2, 3]),
        (1, 10, [9, 5, 7]),
        (6, 6, [10, 11]),
        (3, 11, [12, 20, 13]),
        (5, 8, [14, 15]),
        (12, 12, [21, 22, 23]),
        (10, 15, [27, 25, 29, 24]),
    ]
    spans, start = [], 0
    for num_queries, context_length, block_ids in lengths:
        are_adjacent = block_ids == list(range(block_ids[0], block_ids[0] + len(block_ids)))
        spans.append(
            SequenceSpan(
                query_start=start,
                num_queries=num_queries,
                context_length=context_length,
                block_ids=block_ids,
                first_slot=block_ids[0] * BLOCK_SIZE if are_adjacent else None,
                block_index=None if are_adjacent else torch.tensor(block_ids),
            )
        )
        start += num_queries
    new_slots = [slot for span in spans for slot in slots_of(span)[-span.num_queries :]]
    new_keys, new_values = keys[:, new_slots], values[:, new_slots]
    keys[:, new_slots] = values[:, new_slots] = 9.0  # the kernel writes them
    tables = [span.block_ids for span in spans if span.num_queries == 1]
    step = AttentionStep(
        cache=cache,
        kernel=kernel,
        slots=torch.tensor(new_slots),
        spans=spans,
        on_layer=lambda: None,
        padded_blocks=torch.tensor([table + [0] * (3 - len(table)) for table in tables]),
        queries=native_queries(spans, torch.tensor(new_slots), BLOCK_SIZE) if kernel is attend_native else None,
    )
    query = torch.randn(NUM_KV_HEADS * NUM_GROUPS, start, HEAD_DIM, generator=generator)
    output = kernel(LayerInputs(query, new_keys, new_values, keys, values, SCALING, window), step)
    for span in spans:
        slots = slots_of(span)
        rows = slice(span.query_start, span.query_start + span.num_queries)
        expected = written_out(query[:, rows], keys[:, slots], values[:, slots], window)
        torch.testing.assert_close(output[rows], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_an_unused_cache_costs_no_memory():
    """A large KV cache on CPU takes memory as it is written, not when it is made."""

    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    before = anonymous_bytes()
    cache = KVCacheTensors(
        num_layers=4,
        num_kv_heads=2,
        head_dim=64,
        num_blocks=4000,
        block_size=128,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    keys, _ = cache.layer(0)
    assert keys.nbytes > 2**26
    assert not keys[:, :128].any()
    assert anonymous_bytes() - before < 2**26
