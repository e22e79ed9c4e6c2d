"""How an engine computes its steps on a device: which attention, and whether decode steps are captured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastchat.engine.attention import (
    AttentionStep,
    LayerInputs,
    attend_each,
    attend_native,
    attend_padded,
    attend_triton,
)
from fastchat.engine.decode_graphs import CudaGraphs, GraphBackend
from fastchat.native import attention as native_attention
from fastchat.native.accelerator import runs_triton
from fastchat.native.recording import RecordedCalls


@dataclass(frozen=True, slots=True)
class Execution:
    """The choice for one engine."""

    kernel: Callable[[LayerInputs, AttentionStep], Tensor]
    graphs: GraphBackend | None = None
    """None computes every step operation by operation."""
    waits_once: bool = False
    """Whether the device runs beside the host, which then waits for a step's token ids and for nothing else."""

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Execution:
        """The fastest that the device has."""
        if runs_triton(device):
            return cls(attend_triton, CudaGraphs(), waits_once=True)
        if device.type == "cuda":
            return cls(attend_padded, waits_once=True)
        if device.type == "cpu" and native_attention.is_available(dtype):
            return cls(attend_native, RecordedCalls())
        return cls(attend_each)

    @property
    def takes_paged_queries(self) -> bool:
        """Whether the kernel wants the spans as `PagedQueries`."""
        return self.kernel not in {attend_each, attend_native, attend_padded}
