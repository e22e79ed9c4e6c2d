"""What attention on an accelerator must know of the sequences of a step: integers that lie on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedQueries:
    """Some sequences of a packed batch, S of them, each with new tokens side by side; integer tensors on the device.

    A sequence of length 0 stands for none: its row of the batch gets zeros.
    """

    starts: Tensor
    """The place of their first new token in the packed batch. # (S,)"""
    counts: Tensor
    """Their new tokens, at least 1. # (S,)"""
    lengths: Tensor
    """Tokens to attend over, the new ones included. # (S,)"""
    tables: Tensor
    """Their block ids, filled up with anything; rows may be further apart than they are wide. # (S, max_blocks)"""
    block_size: int
    max_count: int
    """The largest of `counts`."""
