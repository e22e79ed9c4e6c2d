"""Low-rank changes of some rows: what C++ adds is what the formula says, and other rows keep their bits."""

import pytest
import torch

from fastchat.native.build import kernels
from fastchat.native.low_rank import LowRank, UpPiece, add_low_rank


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 1e-2), ("float16", 2e-3)])
@pytest.mark.parametrize("num_inputs", [3, 32, 77])
def test_the_sum_is_that_of_the_formula(dtype, tolerance, num_inputs):
    """For sizes with and without a rest, several pieces, groups of few rows and of many, alone and together."""
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(num_inputs)

    def noise(*shape):
        return torch.randn(*shape, generator=generator).to(kind)

    def change(rank):
        pieces = (UpPiece(0, 0, noise(rank, 19)), UpPiece(19, rank, noise(3, 34)))
        return LowRank(noise(rank + 3, num_inputs), pieces)

    rows, before = noise(50, num_inputs), noise(50, 60)
    groups = [(2, 3, change(4)), (3, 9, change(8)), (12, 50, change(1))]
    together = before.clone()
    add_low_rank(together, rows, groups)
    expected = before.float().clone()
    for start, stop, each in groups:
        inner = rows[start:stop].float() @ each.down.float().t()
        for piece in each.pieces:
            rank, size = piece.up.shape
            part = expected[start:stop, piece.start : piece.start + size]
            part += inner[:, piece.first : piece.first + rank] @ piece.up.float()
    assert (together.float() - expected).norm() / expected.norm() < tolerance
    assert torch.equal(together[9:12], before[9:12])
    assert torch.equal(together[:2], before[:2])
    assert torch.equal(together[:, 53:], before[:, 53:])
    for start, stop, each in groups:
        for row in range(start, stop):
            alone = before[row : row + 1].clone()
            add_low_rank(alone, rows[row : row + 1], [(0, 1, each)])
            assert kernels() is None or torch.equal(alone[0], together[row])
