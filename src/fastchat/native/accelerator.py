"""Whether Triton's kernels run on a device: Triton comes with torch's CUDA build and is no dependency of any other."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch


def runs_triton(device: torch.device) -> bool:
    """Whether `triton_attention` and `triton_products` can be imported, for tensors of this device."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
