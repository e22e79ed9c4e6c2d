"""Weights quantized to the stored forms of `products.py` in C++: the bits of `models/quantize.py`, without its copies.

N outputs, K inputs, K' of them with those that fill up units, G inputs in a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastchat.native.build import ELEMENTS, kernels


def can_store(source: Tensor, held: Tensor) -> bool:
    """Whether the kernels can read `source` and write what `held` is a part of."""
    return (
        kernels() is not None
        and source.dtype in ELEMENTS
        and source.is_cpu
        and held.is_cpu
        and source.is_contiguous()
        and source.numel() > 0
    )


def store_int8(source: Tensor, weight: Tensor, scales: Tensor) -> None:
    """(N, K) of a float type into int8 (N, K) and float32 (N,); a scale is not finite where a value is not."""
    _store("fastchat_store_int8", source, weight, scales)


def store_int4(source: Tensor, packed: Tensor, scales: Tensor) -> None:
    """(N, K) of a float type into uint8 (N, K' / 2) and float32 (N, K' / G); scales as in `store_int8`."""
    _store("fastchat_store_int4", source, packed, scales, packed.shape[1] * 2 // scales.shape[1])


def _store(kernel: str, source: Tensor, held: Tensor, scales: Tensor, *sizes: int) -> None:
    library = kernels()
    assert library is not None
    assert source.is_contiguous()
    assert held.is_contiguous()
    assert scales.is_contiguous()
    assert scales.dtype == torch.float32
    assert len(source) == len(held) == len(scales)
    addresses = source.data_ptr(), held.data_ptr(), scales.data_ptr()
    getattr(library, kernel)(ELEMENTS[source.dtype], *addresses, *source.shape, *sizes, torch.get_num_threads())
