"""Low-rank changes of a linear's output, for groups of its rows: all groups in one call of C++, else in torch.

T rows, K inputs, N outputs, R the sum of a change's ranks. In C++ no bit of a row depends on the rows beside it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastchat.native.build import ELEMENTS, kernels
from fastchat.native.products import multiply


@dataclass(frozen=True, slots=True)
class UpPiece:
    """output[:, start : start + n] += h[:, first : first + r] up."""

    start: int
    first: int
    up: Tensor
    """# (r, n)"""


@dataclass(frozen=True, slots=True)
class LowRank:
    """All changes of one linear: h = x down^T, then each of `pieces`."""

    down: Tensor
    """# (R, K)"""
    pieces: tuple[UpPiece, ...]
    numbers: tuple[int, ...] = field(init=False)
    """What C++ reads of it, behind the rows: R, where `down` is, and the pieces."""

    def __post_init__(self) -> None:
        pieces = [
            number
            for each in self.pieces
            for number in (each.start, each.first, each.up.shape[1], each.up.shape[0], each.up.data_ptr())
        ]
        object.__setattr__(self, "numbers", (len(self.down), self.down.data_ptr(), len(self.pieces), *pieces))


def add_low_rank(output: Tensor, rows: Tensor, groups: Sequence[tuple[int, int, LowRank]]) -> None:
    """Change `output` (T, N) in place for its inputs `rows` (T, K); a group is (first row, one past the last, change).

    No two groups share a row.
    """
    library = kernels() if output.is_cpu and output.is_contiguous() and output.dtype in ELEMENTS else None
    if library is None:
        for start, stop, change in groups:
            _add_in_torch(output[start:stop], rows[start:stop], change)
        return
    assert all(rows.dtype == output.dtype == change.down.dtype for _, _, change in groups)
    rows = rows.contiguous()
    numbers = array("q", [number for start, stop, change in groups for number in (start, stop, *change.numbers)])
    library.fastchat_add_low_rank(
        ELEMENTS[output.dtype],
        rows.data_ptr(),
        output.data_ptr(),
        numbers.buffer_info()[0],
        len(groups),
        rows.shape[1],
        output.shape[1],
        torch.get_num_threads(),
    )


def _add_in_torch(output: Tensor, rows: Tensor, change: LowRank) -> None:
    inner = multiply(rows, change.down)
    for piece in change.pieces:
        rank, size = piece.up.shape
        output[:, piece.start : piece.start + size] += inner[:, piece.first : piece.first + rank] @ piece.up
