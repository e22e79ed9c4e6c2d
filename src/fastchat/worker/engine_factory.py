"""From a checkpoint to an engine, on whichever thread or in whichever process it is to live."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.errors import ConfigError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from fastchat.worker.config import Device, DType, EngineSpec
from fastchat.worker.host_memory import available_bytes

_GIB = 2**30
_CPU_CACHE_BYTES = 4 * _GIB
_CPU_SHARE = 0.4
_GPU_SHARE = 0.9
"""Shares of the memory that is free after loading; the rest is for activations and for others."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything an engine is made from, with the device decided; it crosses a process border as JSON.

    `reserved_bytes` is what models that are loaded later will take; `num_sharers` (this model and those) divide the
    free memory after that. `num_before` models of this worker are there already.
    """

    path: str
    device: Device
    dtype: DType
    quantization: Quantization | None = None
    max_context: int | None = None
    max_batch_tokens: int | None = None
    max_running: int | None = None
    kv_cache_bytes: int | None = None
    max_device_bytes: int | None = None
    reserved_bytes: int = 0
    num_sharers: int = 1
    num_before: int = 0

    @classmethod
    def of(
        cls, path: Path, spec: EngineSpec, *, reserved_bytes: int = 0, num_sharers: int = 1, num_before: int = 0
    ) -> EnginePlan:
        """The plan of one model of a worker."""
        return cls(
            path=str(path),
            device=choose_device(spec.device),
            dtype=spec.dtype,
            quantization=spec.quantization,
            max_context=spec.max_context,
            max_batch_tokens=spec.max_batch_tokens,
            max_running=spec.max_running,
            kv_cache_bytes=spec.kv_cache_bytes,
            max_device_bytes=spec.max_device_bytes,
            reserved_bytes=reserved_bytes,
            num_sharers=num_sharers,
            num_before=num_before,
        )

    def to_json(self) -> str:
        """For the command line of an engine's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EnginePlan:
        """The other direction."""
        fields = json.loads(text)
        quantization = fields.pop("quantization")
        return cls(**fields, quantization=Quantization(**quantization) if quantization else None)


def choose_device(device: Device) -> Device:
    """`auto` as what there is: CUDA, else Apple's GPU, else the CPU. Raises `ConfigError` for one that is absent."""
    has_cuda = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "mps" if has_mps else "cpu"
    if (device == "cuda" and not has_cuda) or (device == "mps" and not has_mps):
        raise ConfigError(f"--device {device}: torch finds no such device here; use --device cpu or auto.")
    return device


def make_engine(plan: EnginePlan) -> Engine:
    """Load the model and build its engine; slow. Raises `CheckpointError` or `ConfigError` in one line."""
    checkpoint = Checkpoint.open(Path(plan.path))
    model = load_model(checkpoint, device=plan.device, dtype=plan.dtype, quantization=plan.quantization)
    make_lean(model)
    config = EngineConfig(
        max_context=min(plan.max_context or checkpoint.max_context, checkpoint.max_context),
        kv_cache_bytes=plan.kv_cache_bytes or _cache_bytes(plan, model),
    )
    if plan.max_batch_tokens is not None:
        config = replace(config, max_batch_tokens=plan.max_batch_tokens)
    if plan.max_running is not None:
        config = replace(config, max_running=plan.max_running)
    return Engine(model, config)


def engine_maker(plan: EnginePlan) -> Callable[[], Engine]:
    """`make_engine` for a thread that takes no arguments."""
    return lambda: make_engine(plan)


def _cache_bytes(plan: EnginePlan, model: PreTrainedModel) -> int:
    """A fair share of what is free once the weights are in place. Raises `ConfigError` where nothing is."""
    if plan.device == "cpu":
        # The caches of the models before take their memory only as they fill, so they still count as free.
        free = int((available_bytes() - plan.reserved_bytes) * _CPU_SHARE)
        return max(1, min(_CPU_CACHE_BYTES, free) // (plan.num_before + plan.num_sharers))
    free = int(_free_device_bytes(plan.device) * _GPU_SHARE) - plan.reserved_bytes
    if plan.max_device_bytes is not None:
        free = min(free, (plan.max_device_bytes - _weight_bytes(model)) * plan.num_sharers)
    if free <= 0:
        raise ConfigError(
            f"{plan.path}: no {plan.device} memory is left for the KV cache beside the weights; load fewer models, "
            "give --max-gpu-memory more, or use --device cpu."
        )
    return free // plan.num_sharers


def _free_device_bytes(device: Device) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
