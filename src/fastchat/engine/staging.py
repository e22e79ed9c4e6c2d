"""Numbers from the host to the device without waiting for it: several lists in one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def send(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Each list as an int64 tensor on the device; on CUDA the copy runs beside the host, from memory that is pinned.

    torch gives that memory to nobody else before the copy has ended.
    """
    return _send(lists, device, torch.int64)


def send_floats(lists: Sequence[Sequence[float]], device: torch.device) -> tuple[Tensor, ...]:
    """The same for float64."""
    return _send(lists, device, torch.float64)


def _send(lists: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    joined = torch.tensor([number for numbers in lists for number in numbers], dtype=dtype)
    if device.type == "cuda":
        joined = joined.pin_memory()
    return torch.split_with_sizes(joined.to(device, non_blocking=True), [len(numbers) for numbers in lists])
