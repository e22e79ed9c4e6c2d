"""The matrix product inside Triton's kernels, which must also run in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def must_widen(tensor: Tensor) -> bool:
    """Whether `dot` has to widen: the interpreter, which takes tensors on CPU, would multiply bfloat16's bits."""
    return tensor.is_cpu


@triton.jit
def dot(first, second, is_wide: tl.constexpr):
    """(M, K) times (K, N) in float32; widened or not, since float32 holds the product of two halves exactly."""
    if is_wide:
        return tl.dot(first.to(tl.float32), second.to(tl.float32), input_precision="ieee")
    return tl.dot(first, second, input_precision="ieee")
