"""Attention of decoding sequences over a paged KV cache, in one call per layer.

Only C++: where `is_available` says no, the engine's torch kernels do the work, under the same equality test. Keys and
values are read in place, block by block; nothing is gathered or padded. Work is shared over sequences, KV heads and
parts of 512 tokens, and a result does not depend on the other sequences nor on the number of threads.
Letters: H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastchat.native.build import ELEMENTS, kernels


def is_available(dtype: torch.dtype) -> bool:
    """Whether `attend` can be used for a cache of this type on CPU."""
    return dtype in ELEMENTS and kernels() is not None


@dataclass(frozen=True, slots=True)
class DecodingSequences:
    """The sequences of a step that have one new token each; B of them, all on CPU, int32, contiguous."""

    rows: Tensor
    """Their tokens' places in the packed batch. # (B,)"""
    lengths: Tensor
    """Tokens to attend over, the new one included. # (B,)"""
    blocks: Tensor
    """Their block tables, filled up with anything. # (B, max_blocks)"""
    block_size: int

    @classmethod
    def of(
        cls, rows: list[int], lengths: list[int], block_tables: list[list[int]], block_size: int
    ) -> DecodingSequences:
        """From plain lists."""
        width = max(map(len, block_tables))
        tables = [table + [0] * (width - len(table)) for table in block_tables]
        return cls(
            torch.tensor(rows, dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            torch.tensor(tables, dtype=torch.int32),
            block_size,
        )


def attend(
    sequences: DecodingSequences,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    output: Tensor,
    *,
    scaling: float,
    window: int | None,
) -> None:
    """Fill in the sequences' rows of `output`.

    query (H, num_tokens, D), keys and values (K, num_slots, D), output (num_tokens, H, D), of one type.
    """
    library = kernels()
    assert library is not None
    if query.stride(2) != 1:
        query = query.contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride()[1:] == (keys.shape[2], 1)
    assert output.is_contiguous()
    num_heads, _, head_dim = query.shape
    library.fastchat_attend(
        ELEMENTS[keys.dtype],
        query.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        output.data_ptr(),
        sequences.rows.data_ptr(),
        sequences.lengths.data_ptr(),
        sequences.blocks.data_ptr(),
        *sequences.blocks.shape,
        num_heads,
        len(keys),
        head_dim,
        *query.stride()[:2],
        keys.stride(0),
        sequences.block_size,
        window or 0,
        scaling,
        torch.get_num_threads(),
    )
