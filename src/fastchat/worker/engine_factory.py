"""From a checkpoint to an engine, on whichever thread or in whichever process it is to live."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import structlog

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.errors import CheckpointError
from fastchat.models.adapters import ModelAdapters
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.progress import show_and_tell
from fastchat.models.shared_tensors import PROCESS_TENSORS
from fastchat.models.stored_form import FloatName, Quantization
from fastchat.models.weights import load_model
from fastchat.worker.device_memory import ChosenDevice
from fastchat.worker.memory_plan import ModelShare

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """Everything an engine is made from, all of it decided; it crosses a process border as JSON."""

    path: str
    device: ChosenDevice
    dtype: FloatName
    quantization: Quantization | None
    max_context: int
    max_batch_tokens: int
    max_running: int
    kv_cache_bytes: int
    adapters: tuple[tuple[str, str], ...] = ()
    """(name, folder) of each that is there from the start."""
    may_miss_adapters: bool = False
    """Whether the model runs without those that cannot be read, because it did so with them before."""

    @classmethod
    def of(
        cls, share: ModelShare, adapters: Sequence[tuple[str, str]] = (), *, may_miss_adapters: bool = False
    ) -> EnginePlan:
        """What the memory plan gives to one model."""
        needs = share.needs
        return cls(
            path=str(needs.model.path),
            device=needs.device,
            dtype=needs.dtype,
            quantization=needs.quantization,
            max_context=share.context,
            max_batch_tokens=needs.max_batch_tokens,
            max_running=needs.max_running,
            kv_cache_bytes=share.cache_bytes,
            adapters=tuple(adapters),
            may_miss_adapters=may_miss_adapters,
        )

    def to_json(self) -> str:
        """For the command line of an engine's process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> EnginePlan:
        """The other direction."""
        fields = json.loads(text)
        quantization = fields.pop("quantization")
        adapters = tuple((name, folder) for name, folder in fields.pop("adapters"))
        return cls(**fields, quantization=Quantization(**quantization) if quantization else None, adapters=adapters)


def make_engine(plan: EnginePlan, tell_progress: Callable[[float], object] = lambda _: None) -> Engine:
    """Load the model and build its engine; slow. `tell_progress` hears the share of the model that has been read.

    Raises `CheckpointError` or `ConfigError` in one line.
    """
    checkpoint = Checkpoint.open(Path(plan.path))
    with show_and_tell(tell_progress) as report:
        model = load_model(
            checkpoint, device=plan.device, dtype=plan.dtype, quantization=plan.quantization, on_progress=report
        )
    make_lean(model)
    if saved_bytes := PROCESS_TENSORS.saved_bytes:
        _log.info("weights shared", model=checkpoint.name, saved_bytes_of_all_models=saved_bytes)
    config = EngineConfig(
        max_context=plan.max_context,
        kv_cache_bytes=plan.kv_cache_bytes,
        max_batch_tokens=plan.max_batch_tokens,
        max_running=plan.max_running,
    )
    engine = Engine(model, config, ModelAdapters(model, checkpoint))
    for name, folder in plan.adapters:
        try:
            engine.adapters.add(name, folder)
        except CheckpointError as error:
            if not plan.may_miss_adapters:
                raise
            _log.error("adapter lost; its base runs without it", model=checkpoint.name, adapter=name, why=error.message)
            engine.adapters.miss(name, error.message)
    return engine
