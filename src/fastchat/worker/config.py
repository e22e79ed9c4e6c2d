"""What a worker is made of: its models and how they are run. Built from flags by the commands, or by a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from fastchat.errors import ConfigError
from fastchat.models.stored_form import Quantization

Device = Literal["auto", "cpu", "cuda", "mps"]
DType = Literal["auto", "float32", "float16", "bfloat16"]
EnginePlace = Literal["auto", "thread", "process"]

_SIZES = ("max_context", "max_batch_tokens", "max_running", "kv_cache_bytes", "max_memory_bytes", "max_device_bytes")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One checkpoint to load. Without `names` it is called as its folder; several names are aliases of one engine."""

    path: Path
    names: tuple[str, ...] = ()
    conv_template: str | None = None

    def __post_init__(self) -> None:
        if any(not name or name != name.strip() for name in self.names):
            raise ConfigError(f"--model-names for {self.path} has an empty name; write it like a,b.")


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """How each model is run. Sizes are in bytes or tokens; None lets the device decide.

    `engine_place` auto is a process on CUDA, where many streams would fight the engine for one interpreter, and a
    thread elsewhere. `max_memory_bytes` is the budget of a whole worker on a CPU, `max_device_bytes` on a GPU.
    """

    device: Device = "auto"
    dtype: DType = "auto"
    quantization: Quantization | None = None
    engine_place: EnginePlace = "auto"
    max_context: int | None = None
    max_batch_tokens: int | None = None
    max_running: int | None = None
    kv_cache_bytes: int | None = None
    max_memory_bytes: int | None = None
    max_device_bytes: int | None = None
    adapter_reserve_bytes: int = 0
    """Kept free for each model's adapters that come while it is served."""

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}.")

    def has_engine_process(self, device: str) -> bool:
        """Whether each engine has a process of its own on that device."""
        return self.engine_place == "process" or (self.engine_place == "auto" and device == "cuda")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process. `address` is the URL that others call it by; None as controller: it does not register.

    A model that nobody uses for `idle_timeout_s` leaves memory (None: when its memory is wanted); `pinned` ones, by any
    of their names, never do. Adapters that are added while it runs lie below `adapter_dir`; None: none may be.
    """

    models: tuple[ModelSpec, ...]
    address: str
    cluster_token: str = field(repr=False)
    controller_address: str | None = None
    engine: EngineSpec = EngineSpec()
    stream_interval: int = 1
    default_seed: int | None = None
    truncates_embedding_input: bool = False
    hang_after_s: float = 30.0
    idle_timeout_s: float | None = None
    pinned: tuple[str, ...] = ()
    adapter_dir: Path | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("A worker needs a model; give --model-path.")
        if not self.cluster_token:
            raise ConfigError("A worker needs a cluster token.")
        if self.stream_interval < 1:
            raise ConfigError(f"--stream-interval must be at least 1, not {self.stream_interval}.")
        if self.idle_timeout_s is not None and self.idle_timeout_s <= 0:
            raise ConfigError(f"--idle-timeout must be more than 0 seconds, not {self.idle_timeout_s}.")
        if self.default_seed is not None and not -(2**63) <= self.default_seed < 2**63:
            raise ConfigError("--seed must fit into 64 bits.")
