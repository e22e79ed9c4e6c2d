"""Attention over a paged KV cache, in one call per layer: single tokens and chunks of prompts alike.

Only C++: where `is_available` says no, the engine's torch kernels do the work, under the same equality test. Keys and
values are written to their slots and read in place, block by block; nothing is gathered or padded. Work is shared over
sequences, KV heads and parts of a context or of a chunk, and a result does not depend on the other sequences nor on the
number of threads. Letters: H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastchat.native.build import ELEMENTS, kernels

MAX_SINGLES = 8
"""Up to so many new tokens behind a prompt are computed one by one, each with the bits that it has alone."""


def is_available(dtype: torch.dtype) -> bool:
    """Whether `attend` can be used for a cache of this type on CPU."""
    return dtype in ELEMENTS and kernels() is not None


@dataclass(frozen=True, slots=True)
class Queries:
    """The new tokens of a step: B single ones, then C chunks; all on CPU, contiguous, int64."""

    rows: Tensor
    """The places of the tokens, or of a chunk's first ones, in the packed batch. # (B + C,)"""
    counts: Tensor
    """How many tokens each stands for. # (B + C,)"""
    lengths: Tensor
    """Tokens to attend over, up to the last new one. # (B + C,)"""
    blocks: Tensor
    """Block tables, filled up with anything. # (B + C, max_blocks)"""
    num_single: int
    slots: Tensor
    """Where the keys and values of all tokens of the packed batch go. # (num_tokens,)"""
    block_size: int

    @classmethod
    def of(cls, sequences: list[tuple[int, int, int, list[int], bool]], slots: Tensor, block_size: int) -> Queries:
        """From (row, count, length, block table, whether it is of a prompt) of each sequence.

        A prompt's part is a chunk however short it is: where a prompt is cut, by what is cached and by the others of a
        step, changes no bit of it.
        """
        singles, chunks = [], []
        for row, count, length, table, is_prompt in sequences:
            if is_prompt or count > MAX_SINGLES:
                chunks.append((row, count, length, table))
                continue
            singles += [(row + i, 1, length - count + 1 + i, table) for i in range(count)]
        rows, counts, lengths, tables = zip(*singles, *chunks, strict=True)
        width = max(map(len, tables))
        return cls(
            torch.tensor(rows, dtype=torch.int64),
            torch.tensor(counts, dtype=torch.int64),
            torch.tensor(lengths, dtype=torch.int64),
            torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int64),
            len(singles),
            slots,
            block_size,
        )


def attend(
    queries: Queries,
    query: Tensor,
    new: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    output: Tensor,
    *,
    scaling: float,
    window: int | None,
) -> None:
    """Write the new keys and values to their slots, and fill in the queries' rows of `output`.

    query (H, num_tokens, D), new (K, num_tokens, D), cache (K, num_slots, D), output (num_tokens, H, D), of one type.
    """
    library = kernels()
    assert library is not None
    keys, values = cache
    new_keys, new_values = new
    if query.stride(2) != 1:
        query = query.contiguous()
    if new_keys.stride() != new_values.stride() or new_keys.stride(2) != 1:
        new_keys, new_values = new_keys.contiguous(), new_values.contiguous()
    num_heads, num_tokens, head_dim = query.shape
    assert query.dtype == new_keys.dtype == new_values.dtype == keys.dtype == values.dtype == output.dtype
    assert keys.stride() == values.stride()
    assert keys.stride()[1:] == (head_dim, 1)
    assert output.is_contiguous()
    assert queries.slots.dtype == torch.int64
    assert len(queries.slots) == num_tokens
    library.fastchat_attend(
        ELEMENTS[keys.dtype],
        query.data_ptr(),
        new_keys.data_ptr(),
        new_values.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        queries.slots.data_ptr(),
        queries.rows.data_ptr(),
        queries.counts.data_ptr(),
        queries.lengths.data_ptr(),
        queries.blocks.data_ptr(),
        queries.num_single,
        len(queries.rows) - queries.num_single,
        queries.blocks.shape[1],
        num_tokens,
        num_heads,
        len(keys),
        head_dim,
        *query.stride()[:2],
        *new_keys.stride()[:2],
        keys.stride(0),
        queries.block_size,
        window or 0,
        scaling,
        torch.get_num_threads(),
    )
