"""The small operators of a transformer layer, each one call: C++ where it can be had, else torch.

Both forms round to the element type where transformers' modules do. T tokens, S features, R rotated elements per head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu

from fastchat.native.build import ELEMENTS, kernels


def rms_norm(rows: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """rows (T, S) divided by their root mean square, times weight (S,) -> (T, S)."""
    if _are_for_torch(rows, weight):
        wide = rows.float()
        normalized = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        return weight * normalized.to(rows.dtype)
    return _normalize(rows, None, weight, epsilon)


def add_rms_norm(rows: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Add rows (T, S) to `residual` (T, S) in place; the sum normalized as by `rms_norm` -> (T, S)."""
    if _are_for_torch(rows, residual, weight):
        return rms_norm(residual.add_(rows), weight, epsilon)
    return _normalize(rows, residual, weight, epsilon)


def _normalize(rows: Tensor, added: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    library = kernels()
    assert library is not None
    assert weight.shape == rows.shape[1:]
    assert added is None or added.shape == rows.shape
    output = torch.empty_like(rows)
    library.fastchat_normalize(
        ELEMENTS[rows.dtype],
        rows.data_ptr(),
        None if added is None else added.data_ptr(),
        weight.data_ptr(),
        output.data_ptr(),
        *rows.shape,
        1,
        rows.shape[1],
        epsilon,
        torch.get_num_threads(),
    )
    return output


def normalize_heads(heads: Tensor, weight: Tensor, epsilon: float) -> None:
    """`rms_norm` in place for each head of heads (T, num_heads, D), which may be a part of a packed row."""
    library = kernels()
    num_tokens, num_heads, head_dim = heads.shape
    assert weight.shape == (head_dim,)
    if library is None or not _is_packed(heads) or _are_for_torch(weight) or heads.dtype != weight.dtype:
        heads.copy_(rms_norm(heads.reshape(-1, head_dim), weight, epsilon).view(heads.shape))
        return
    address = heads.data_ptr()
    library.fastchat_normalize(
        ELEMENTS[heads.dtype],
        address,
        None,
        weight.data_ptr(),
        address,
        num_tokens * num_heads,
        head_dim,
        num_heads,
        heads.stride(0),
        epsilon,
        torch.get_num_threads(),
    )


def add_rows(rows: Tensor, residual: Tensor) -> None:
    """Add rows (T, S) to `residual` (T, S) in place."""
    library = kernels()
    if library is None or _are_for_torch(rows, residual):
        residual.add_(rows)
        return
    assert rows.shape == residual.shape
    library.fastchat_add(
        ELEMENTS[rows.dtype], residual.data_ptr(), rows.data_ptr(), rows.numel(), torch.get_num_threads()
    )


def silu_and_multiply(rows: Tensor) -> Tensor:
    """rows (T, 2S), gates in the first half: silu(gate) times the second half -> (T, S)."""
    library = kernels()
    size = rows.shape[1] // 2
    if library is None or _are_for_torch(rows):
        return silu(rows[:, :size]) * rows[:, size:]
    output = rows.new_empty((len(rows), size))
    library.fastchat_silu_and_multiply(
        ELEMENTS[rows.dtype], rows.data_ptr(), output.data_ptr(), len(rows), size, torch.get_num_threads()
    )
    return output


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, *, is_interleaved: bool) -> None:
    """Rotary position embedding in place on the first R elements of each head of queries or keys.

    heads (T, num_heads, D), may be a part of a packed row; cosines and sines (T, R / 2) of the type of the heads.
    Pairs are (i, i + R / 2) as in Llama, or, interleaved, (2i, 2i + 1) as in GLM.
    """
    library = kernels()
    num_tokens, num_heads, head_dim = heads.shape
    half = cosines.shape[1]
    assert cosines.shape == sines.shape == (num_tokens, half)
    assert 2 * half <= head_dim
    if library is None or not _is_packed(heads) or _are_for_torch(cosines, sines) or heads.dtype != cosines.dtype:
        _rotate_in_torch(heads, cosines, sines, is_interleaved=is_interleaved)
        return
    library.fastchat_rotate(
        ELEMENTS[heads.dtype],
        heads.data_ptr(),
        cosines.data_ptr(),
        sines.data_ptr(),
        num_tokens,
        num_heads,
        head_dim,
        heads.stride(0),
        half,
        is_interleaved,
        torch.get_num_threads(),
    )


def _rotate_in_torch(heads: Tensor, cosines: Tensor, sines: Tensor, *, is_interleaved: bool) -> None:
    half = cosines.shape[1]
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)  # (T, 1, R / 2)
    if is_interleaved:
        first, second = heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2]
    else:
        first, second = heads[..., :half], heads[..., half : 2 * half]
    turned_first = first * cosines - second * sines
    second.copy_(second * cosines + first * sines)
    first.copy_(turned_first)


def _is_packed(heads: Tensor) -> bool:
    """Whether the heads of a token lie side by side."""
    _, num_heads, head_dim = heads.shape
    return heads.stride(2) == 1 and (num_heads == 1 or heads.stride(1) == head_dim)


def _are_for_torch(*tensors: Tensor) -> bool:
    """Whether the kernels cannot take these: they read CPU memory in order, of one type, and record no gradients."""
    return (
        kernels() is None
        or tensors[0].dtype not in ELEMENTS
        or not all(tensor.is_cpu and tensor.is_contiguous() and tensor.dtype == tensors[0].dtype for tensor in tensors)
        or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
    )
