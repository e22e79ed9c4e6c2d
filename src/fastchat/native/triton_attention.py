"""Attention over a paged KV cache as a Triton kernel, for CUDA. Import it only where `accelerator.has_triton` says so.

One program computes a tile: some queries of one sequence times all query heads of one KV head, as the rows of a matrix
product. Keys and values are read in place, by block table. A decoding sequence has one query, so its keys are cut into
up to `NUM_PARTS` parts, computed side by side and combined by a second kernel (flash-decoding, Dao et al. 2023).
Where the cuts are depends on the sequence's own length alone, so a row's result never depends on its batch mates; and
no size of a launch depends on a length, so a launch of decoding sequences can be captured in a CUDA graph.

Scores are float32 whatever the cache's type. Letters: S sequences, T tokens, H query heads, K KV heads, G = H / K,
D head size. Tile shapes are chosen by what fits into shared memory; they were not measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastchat.native.paged_queries import PagedQueries
from fastchat.native.triton_dot import dot, must_widen

NUM_PARTS = 16
MIN_PART = 256
"""Keys of a part at the least."""
CHUNK_ROWS = 64
"""Rows of a tile of a prompt's chunk: queries times G."""
MIN_ROWS = 16
"""A matrix product on the device wants as many."""
NO_WINDOW = 2**30
LOG2_E = 1.4426950408889634


def attend(
    queries: PagedQueries,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    *,
    scaling: float,
    window: int | None,
) -> None:
    """Fill in the sequences' rows of `output`.

    query (H, T, D), keys and values (K, num_slots, D), output (T, H, D), of one type.
    """
    if query.stride(2) != 1:
        query = query.contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride()[1:] == (keys.shape[2], 1)
    assert output.is_contiguous()
    num_heads, _, head_dim = query.shape
    num_kv_heads, num_sequences = len(keys), len(queries.starts)
    num_groups = num_heads // num_kv_heads
    is_decoding = queries.max_count == 1
    num_queries = 1 if is_decoding else max(1, CHUNK_ROWS // num_groups)
    num_parts = NUM_PARTS if is_decoding else 1
    num_tiles = triton.cdiv(queries.max_count, num_queries)
    padded_dim = triton.next_power_of_2(head_dim)
    parts = query.new_empty((num_sequences, num_heads, num_parts, head_dim) if is_decoding else 0, dtype=torch.float32)
    totals = query.new_empty((2, num_sequences, num_heads, num_parts) if is_decoding else (2, 0), dtype=torch.float32)
    _attend_tile[(num_sequences, num_kv_heads, num_tiles * num_parts)](
        query,
        keys,
        values,
        output,
        parts,
        *totals,
        queries.starts,
        queries.counts,
        queries.lengths,
        queries.tables,
        queries.tables.stride(0),
        *query.stride()[:2],
        keys.stride(0),
        scaling * LOG2_E,
        window or NO_WINDOW,
        num_groups=num_groups,
        head_dim=head_dim,
        padded_dim=padded_dim,
        block_size=queries.block_size,
        num_queries=num_queries,
        num_rows=max(MIN_ROWS, triton.next_power_of_2(num_queries * num_groups)),
        num_keys=32 if keys.dtype == torch.float32 else 64,
        num_parts=num_parts,
        min_part=MIN_PART,
        is_wide=must_widen(keys),
        num_warps=4,
        num_stages=2,
    )
    if is_decoding:
        _combine_parts[(num_sequences, num_heads)](
            output,
            parts,
            *totals,
            queries.starts,
            queries.lengths,
            window or NO_WINDOW,
            head_dim=head_dim,
            padded_dim=padded_dim,
            num_parts=num_parts,
            min_part=MIN_PART,
        )


@triton.jit
def _part_size(num_visible, num_parts: tl.constexpr, min_part: tl.constexpr):
    """Keys of each part but the last."""
    return tl.maximum(tl.cdiv(num_visible, num_parts), min_part)


@triton.jit
def _attend_tile(
    query,
    keys,
    values,
    output,
    parts,
    maxima,
    sums,
    starts,
    counts,
    lengths,
    tables,
    table_stride,
    query_head_stride,
    query_token_stride,
    cache_head_stride,
    scaling,
    window,
    num_groups: tl.constexpr,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
    num_queries: tl.constexpr,
    num_rows: tl.constexpr,
    num_keys: tl.constexpr,
    num_parts: tl.constexpr,
    min_part: tl.constexpr,
    is_wide: tl.constexpr,
):
    sequence, kv_head = tl.program_id(0), tl.program_id(1)
    part, first = tl.program_id(2) % num_parts, tl.program_id(2) // num_parts * num_queries
    start, count, length = tl.load(starts + sequence), tl.load(counts + sequence), tl.load(lengths + sequence)
    first_place = length - count + first
    # The keys that some query of the tile sees, and those of them that are this part's.
    low = tl.maximum(first_place - window + 1, 0)
    high = tl.minimum(first_place + num_queries, length)
    size = _part_size(high - low, num_parts, min_part) if num_parts > 1 else high - low
    part_low = low + part * size
    part_high = tl.minimum(part_low + size, high)
    if (first < count) & (part_low < part_high):
        row = tl.arange(0, num_rows)
        index = first + row // num_groups
        head = kv_head * num_groups + row % num_groups
        is_row = (row < num_queries * num_groups) & (index < count)
        column = tl.arange(0, padded_dim)
        is_column = column < head_dim
        token = (start + index).to(tl.int64)
        rows = tl.load(
            query + head[:, None] * query_head_stride + token[:, None] * query_token_stride + column[None, :],
            mask=is_row[:, None] & is_column[None, :],
            other=0.0,
        )
        attended, maximum, total = _attend_keys(
            rows,
            keys + kv_head.to(tl.int64) * cache_head_stride,
            values + kv_head.to(tl.int64) * cache_head_stride,
            tables + sequence * table_stride,
            length - count + index,
            part_low,
            part_high,
            scaling,
            window,
            head_dim,
            padded_dim,
            block_size,
            num_rows,
            num_keys,
            is_wide,
        )
        is_kept = is_row[:, None] & is_column[None, :]
        num_heads = tl.num_programs(1) * num_groups
        if num_parts == 1:
            at = (token * num_heads + head) * head_dim
            result = attended / tl.where(is_row, total, 1.0)[:, None]
            tl.store(output + at[:, None] + column[None, :], result.to(output.dtype.element_ty), mask=is_kept)
        else:
            at = (sequence * num_heads + head).to(tl.int64) * num_parts + part
            tl.store(parts + at[:, None] * head_dim + column[None, :], attended, mask=is_kept)
            tl.store(maxima + at, maximum, mask=is_row)
            tl.store(sums + at, total, mask=is_row)


@triton.jit
def _attend_keys(
    rows,
    keys,
    values,
    table,
    place,
    low,
    high,
    scaling,
    window,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    block_size: tl.constexpr,
    num_rows: tl.constexpr,
    num_keys: tl.constexpr,
    is_wide: tl.constexpr,
):
    """Rows at `place` over the keys from `low` to `high`: weighted sums, the largest scores, sums of the weights."""
    maximum = tl.full((num_rows,), float("-inf"), tl.float32)
    total = tl.zeros((num_rows,), tl.float32)
    attended = tl.zeros((num_rows, padded_dim), tl.float32)
    column = tl.arange(0, padded_dim)
    for begin in range(low, high, num_keys):
        key = begin + tl.arange(0, num_keys)
        is_key = key < high
        block = tl.load(table + key // block_size, mask=is_key, other=0).to(tl.int64)
        at = (block * block_size + key % block_size)[:, None] * head_dim + column[None, :]
        is_held = is_key[:, None] & (column < head_dim)[None, :]
        seen = tl.load(keys + at, mask=is_held, other=0.0)
        scores = dot(rows, tl.trans(seen), is_wide) * scaling
        is_seen = is_key[None, :] & (key[None, :] <= place[:, None]) & (key[None, :] > place[:, None] - window)
        scores = tl.where(is_seen, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen no key yet has the maximum -inf, from which nothing can be subtracted.
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        shares = tl.exp2(scores - base[:, None])
        faded = tl.exp2(maximum - base)
        total = total * faded + tl.sum(shares, 1)
        seen = tl.load(values + at, mask=is_held, other=0.0)
        attended = attended * faded[:, None] + dot(shares.to(seen.dtype), seen, is_wide)
        maximum = new_maximum
    return attended, maximum, total


@triton.jit
def _combine_parts(
    output,
    parts,
    maxima,
    sums,
    starts,
    lengths,
    window,
    head_dim: tl.constexpr,
    padded_dim: tl.constexpr,
    num_parts: tl.constexpr,
    min_part: tl.constexpr,
):
    sequence, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(lengths + sequence)
    num_visible = tl.minimum(length, window)
    part = tl.arange(0, num_parts)
    is_part = part * _part_size(num_visible, num_parts, min_part) < num_visible
    at = (sequence * tl.num_programs(1) + head).to(tl.int64) * num_parts + part
    maximum = tl.load(maxima + at, mask=is_part, other=float("-inf"))
    highest = tl.max(maximum, 0)
    weights = tl.where(is_part, tl.exp2(maximum - tl.where(length > 0, highest, 0.0)), 0.0)
    total = tl.sum(weights * tl.load(sums + at, mask=is_part, other=0.0), 0)
    column = tl.arange(0, padded_dim)
    is_column = column < head_dim
    is_held = is_part[:, None] & is_column[None, :]
    attended = tl.load(parts + at[:, None] * head_dim + column[None, :], mask=is_held, other=0.0)
    result = tl.sum(attended * weights[:, None], 0) / tl.where(length > 0, total, 1.0)
    token = tl.load(starts + sequence).to(tl.int64)
    target = output + (token * tl.num_programs(1) + head) * head_dim + column
    tl.store(target, result.to(output.dtype.element_ty), mask=is_column)
