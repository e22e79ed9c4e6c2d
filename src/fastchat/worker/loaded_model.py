"""Models in this worker: each is opened, given an engine, and made ready for the API."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog

from fastchat.api.served_model import ServedModel
from fastchat.engine.client import EngineClient
from fastchat.engine.process_client import ProcessEngineClient
from fastchat.engine.thread_client import ThreadEngineClient
from fastchat.engine.turns import Turns
from fastchat.errors import ConfigError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import ChatFormat, SamplingDefaults, Tokenizer
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.tokenizer import load_tokenizer
from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig
from fastchat.worker.engine_factory import EnginePlan, make_engine
from fastchat.worker.engine_process import engine_command
from fastchat.worker.memory_plan import ModelShare
from fastchat.worker.memory_remedy import plan_or_refuse
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.on_demand_engine import OnDemandEngine, make_keeper, promised_limits

_log = structlog.stdlib.get_logger(__name__)


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
            "model loaded" if self.engine.is_computing else "model waits for its turn",
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


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """All models of a worker; `keeper` brings them into memory and frees them, where they may come and go."""

    models: tuple[OpenedModel, ...]
    keeper: ModelKeeper | None = None


def open_models(config: WorkerConfig, *, on_demand: bool = False) -> OpenedModels:
    """Check all checkpoints before the first weight is read. Raises `CheckpointError` or `ConfigError`.

    `on_demand`: the models may come and go. Without it all of them are held as long as their engines are open.
    """
    checkpoints = [Checkpoint.open(spec.path) for spec in config.models]
    names = [spec.names or (checkpoint.name,) for spec, checkpoint in zip(config.models, checkpoints, strict=True)]
    _check_names(names)
    plan = plan_or_refuse(list(zip((each[0] for each in names), checkpoints, strict=True)), config.engine)
    turns: defaultdict[str, Turns] = defaultdict(Turns)  # by device
    makers = [
        partial(_make_client, config.engine, EnginePlan.of(share), turns[share.needs.device]) for share in plan.shares
    ]
    keeper = None
    if on_demand:
        pinned = _first_names(config.pinned, names)
        keeper = make_keeper(plan, makers, idle_timeout_s=config.idle_timeout_s, pinned=pinned)
    opened = []
    for spec, own_names, checkpoint, share, make in zip(
        config.models, names, checkpoints, plan.shares, makers, strict=True
    ):
        _log_share(share)
        engine = make() if keeper is None else OnDemandEngine(own_names[0], keeper, promised_limits(share))
        opened.append(_open_model(spec, own_names, checkpoint, engine))
    return OpenedModels(tuple(opened), keeper)


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


def _log_share(share: ModelShare) -> None:
    needs = share.needs
    log = _log.warning if share.context < needs.context else _log.info
    log(
        "memory plan",
        model=needs.model.name,
        device=needs.device,
        weight_bytes=sum(needs.weight_bytes.values()),
        kv_cache_bytes=share.cache_bytes,
        step_bytes=share.step_bytes,
        max_context=share.context,
        wanted_context=needs.context,
    )


def _make_client(engine: EngineSpec, plan: EnginePlan, turns: Turns) -> EngineClient:
    if engine.has_engine_process(plan.device):
        return ProcessEngineClient(engine_command(plan))
    client = ThreadEngineClient(lambda: make_engine(plan, tell), name=Path(plan.path).name, turns=turns)

    def tell(progress: float) -> None:
        client.load_progress = progress

    return client


def _first_names(wanted: Sequence[str], names: Sequence[tuple[str, ...]]) -> set[str]:
    """The models that `--pin` names, by any of their names, each by its first."""
    first_names = {name: group[0] for group in names for name in group}
    for name in wanted:
        if name not in first_names:
            raise ConfigError(f"--pin names {name!r}, but the models here are {', '.join(first_names)}.")
    return {first_names[name] for name in wanted}


def _check_names(names: Sequence[tuple[str, ...]]) -> None:
    seen: set[str] = set()
    for name in (name for group in names for name in group):
        if name in seen:
            raise ConfigError(f"Two models are named {name!r}; give each its own with --model-names.")
        seen.add(name)
