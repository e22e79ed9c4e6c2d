"""Models in this worker: each is opened, given an engine, and made ready for the API."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from fastchat.api.served_model import ServedModel
from fastchat.engine.client import EngineClient
from fastchat.engine.process_client import ProcessEngineClient
from fastchat.engine.thread_client import ThreadEngineClient
from fastchat.errors import ConfigError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import ChatFormat, SamplingDefaults, Tokenizer
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.tokenizer import load_tokenizer
from fastchat.worker.config import ModelSpec, WorkerConfig
from fastchat.worker.engine_factory import EnginePlan, engine_maker
from fastchat.worker.engine_process import engine_command

_log = structlog.stdlib.get_logger(__name__)

_WEIGHT_FILES = ("*.safetensors", "*.bin")


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose text side is loaded and whose engine has not been started."""

    names: tuple[str, ...]
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    chat_format: ChatFormat
    sampling_defaults: SamplingDefaults
    engine: EngineClient

    async def start(self, config: WorkerConfig) -> ServedModel:
        """Load the weights and serve. Raises `CheckpointError`, `ConfigError` or `EngineError`."""
        began_at = time.monotonic()
        await self.engine.start()
        limits = self.engine.limits
        _log.info(
            "model loaded",
            model=",".join(self.names),
            device=limits.device,
            dtype=limits.dtype,
            max_context=limits.max_context,
            kv_cache_tokens=limits.num_blocks * limits.block_size,
            seconds=round(time.monotonic() - began_at, 1),
        )
        return ServedModel(
            names=self.names,
            tokenizer=self.tokenizer,
            chat_format=self.chat_format,
            engine=self.engine,
            max_context=limits.max_context,
            sampling_defaults=self.sampling_defaults,
            created=int(time.time()),
            stream_interval=config.stream_interval,
            default_seed=config.default_seed,
            truncates_embedding_input=config.truncates_embedding_input,
        )


def open_models(config: WorkerConfig) -> list[OpenedModel]:
    """Check all checkpoints before the first weight is read. Raises `CheckpointError` or `ConfigError`."""
    checkpoints = [Checkpoint.open(spec.path) for spec in config.models]
    names = [spec.names or (checkpoint.name,) for spec, checkpoint in zip(config.models, checkpoints, strict=True)]
    _check_names(names)
    sizes = [_bytes_on_disk(checkpoint.path) for checkpoint in checkpoints]
    opened = []
    for number, (spec, checkpoint) in enumerate(zip(config.models, checkpoints, strict=True)):
        plan = EnginePlan.of(
            checkpoint.path,
            config.engine,
            reserved_bytes=sum(sizes[number + 1 :]) + config.engine.num_later_weight_bytes,
            num_sharers=len(checkpoints) - number + config.engine.num_later_models,
            num_before=number,
        )
        opened.append(_open_model(spec, names[number], checkpoint, _make_client(config, plan)))
    return opened


def _open_model(spec: ModelSpec, names: tuple[str, ...], checkpoint: Checkpoint, engine: EngineClient) -> OpenedModel:
    tokenizer = load_tokenizer(checkpoint)
    chat_format = load_chat_format(checkpoint, tokenizer, spec.conv_template)
    _log.info("prompt format", model=",".join(names), format=chat_format.name, source=chat_format.source)
    return OpenedModel(
        names=names,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat_format=chat_format,
        sampling_defaults=load_sampling_defaults(checkpoint),
        engine=engine,
    )


def _make_client(config: WorkerConfig, plan: EnginePlan) -> EngineClient:
    place = config.engine.engine_place
    if place == "process" or (place == "auto" and plan.device == "cuda"):
        return ProcessEngineClient(engine_command(plan))
    return ThreadEngineClient(engine_maker(plan), name=Path(plan.path).name)


def _check_names(names: Sequence[tuple[str, ...]]) -> None:
    seen: set[str] = set()
    for name in (name for group in names for name in group):
        if name in seen:
            raise ConfigError(f"Two models are named {name!r}; give each its own with --model-names.")
        seen.add(name)


def _bytes_on_disk(path: Path) -> int:
    """About what the weights will take; the kind of file that is there in greater number of bytes is the one read."""
    return max(sum(file.stat().st_size for file in path.glob(pattern)) for pattern in _WEIGHT_FILES)
