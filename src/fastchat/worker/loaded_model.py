"""Models in this worker: each is opened, given an engine, and made ready for the API."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from fastchat.models.interface import ChatFormat, SamplingDefaults
from fastchat.models.sampling_defaults import load_sampling_defaults
from fastchat.models.stored_form import FLOAT_BYTES
from fastchat.models.tokenizer import TemplateTokenizer, load_tokenizer
from fastchat.worker.config import EngineSpec, WorkerConfig
from fastchat.worker.engine_factory import EnginePlan, make_engine
from fastchat.worker.engine_process import engine_command
from fastchat.worker.memory_plan import ModelShare
from fastchat.worker.memory_remedy import plan_or_refuse
from fastchat.worker.model_groups import AdapterGroup, ModelGroup, group_models, planned_group
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.on_demand_engine import OnDemandEngine, make_keeper, promised_limits
from fastchat.worker.present_adapters import HeldAdapter, PresentAdapters

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenedAdapter:
    """What an adapter changes of its base's text side: names, and the prompt format where it brings its own."""

    names: tuple[str, ...]
    chat_format: ChatFormat
    num_prefix_slots: int


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A checkpoint whose text side is loaded and whose engine has not been started."""

    names: tuple[str, ...]
    adapters: tuple[OpenedAdapter, ...]
    checkpoint: Checkpoint
    tokenizer: TemplateTokenizer
    chat_format: ChatFormat
    sampling_defaults: SamplingDefaults
    engine: EngineClient
    present: PresentAdapters
    value_bytes: int
    """Of each number of an adapter in memory."""

    @property
    def all_names(self) -> tuple[str, ...]:
        """Its own, then those of the adapters that are there from the start."""
        return (*self.names, *(name for adapter in self.adapters for name in adapter.names))

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

    async def start_last(self, config: WorkerConfig) -> ServedModel:
        """As `start`, for who wants one model: the adapter that was asked for, else the base."""
        base = await self.start(config)
        return [base, *self.adapted(base)][-1]

    def adapted(self, base: ServedModel) -> list[ServedModel]:
        """The adapters that are there from the start, served by the engine of `base`, which `start` gave."""
        return [self.served_adapter(base, each, key=each.names[0]) for each in self.adapters]

    def served_adapter(self, base: ServedModel, adapter: OpenedAdapter, *, key: str) -> ServedModel:
        """One adapter, served by the engine of `base`, which knows it as `key`."""
        limits = base.engine.limits
        return replace(
            base,
            names=adapter.names,
            chat_format=adapter.chat_format,
            adapter=key,
            base_name=self.names[0],
            created=int(time.time()),
            max_context=min(base.max_context, limits.num_blocks * limits.block_size - adapter.num_prefix_slots),
        )

    def open_adapter(self, adapter: AdapterGroup) -> OpenedAdapter:
        """The text side of an adapter of this model. Raises `CheckpointError`."""
        chat_format = _adapters_format(adapter, self.checkpoint, self.tokenizer, self.chat_format)
        return OpenedAdapter(adapter.names, chat_format, adapter.folder.num_slots)


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """All models of a worker; `keeper` brings them into memory and frees them, where they may come and go."""

    models: tuple[OpenedModel, ...]
    keeper: ModelKeeper | None = None


def open_models(config: WorkerConfig, *, on_demand: bool = False) -> OpenedModels:
    """Check all checkpoints before the first weight is read. Raises `CheckpointError` or `ConfigError`.

    `on_demand`: the models may come and go. Without it all of them are held as long as their engines are open.
    """
    groups = group_models(config.models)
    plan = plan_or_refuse([planned_group(group) for group in groups], config.engine)
    turns: defaultdict[str, Turns] = defaultdict(Turns)  # by device
    presents = [_present_adapters(group, share) for share, group in zip(plan.shares, groups, strict=True)]
    makers = [
        partial(_make_client, config.engine, share, present, turns[share.needs.device])
        for share, present in zip(plan.shares, presents, strict=True)
    ]
    keeper = None
    if on_demand:
        pinned = _first_names(config.pinned, [group.all_names for group in groups])
        keeper = make_keeper(plan, makers, idle_timeout_s=config.idle_timeout_s, pinned=pinned)
    opened = []
    for group, share, present, make in zip(groups, plan.shares, presents, makers, strict=True):
        _log_share(share)
        engine = make() if keeper is None else OnDemandEngine(group.names[0], keeper, promised_limits(share), present)
        opened.append(_open_model(group, engine, present, FLOAT_BYTES[share.needs.dtype]))
    return OpenedModels(tuple(opened), keeper)


def _present_adapters(group: ModelGroup, share: ModelShare) -> PresentAdapters:
    """Those that are there from the start; an engine calls them by their names."""
    value_bytes = FLOAT_BYTES[share.needs.dtype]
    return PresentAdapters(
        HeldAdapter(each.names[0], str(each.folder.path), each.folder.num_values * value_bytes)
        for each in group.adapters
    )


def _open_model(group: ModelGroup, engine: EngineClient, present: PresentAdapters, value_bytes: int) -> OpenedModel:
    checkpoint = group.checkpoint
    tokenizer = load_tokenizer(checkpoint)
    chat_format = load_chat_format(checkpoint, tokenizer, group.conv_template)
    opened = OpenedModel(
        names=group.names,
        adapters=(),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat_format=chat_format,
        sampling_defaults=load_sampling_defaults(checkpoint),
        engine=engine,
        present=present,
        value_bytes=value_bytes,
    )
    opened = replace(opened, adapters=tuple(opened.open_adapter(each) for each in group.adapters))
    for names, own in ((group.names, chat_format), *((each.names, each.chat_format) for each in opened.adapters)):
        _log.info("prompt format", model=",".join(names), format=own.name, source=own.source)
    return opened


def _adapters_format(
    adapter: AdapterGroup, base: Checkpoint, tokenizer: TemplateTokenizer, base_format: ChatFormat
) -> ChatFormat:
    """What the command says, else the template in the adapter's folder, else its base's."""
    own = Checkpoint(adapter.folder.path, base.config, base.family)
    has_template = (own.path / "chat_template.jinja").is_file() or own.tokenizer_config.get("chat_template")
    if adapter.conv_template is None and not has_template:
        return base_format
    return load_chat_format(own, tokenizer, adapter.conv_template)


def _log_share(share: ModelShare) -> None:
    needs = share.needs
    log = _log.warning if share.context < needs.context else _log.info
    log(
        "memory plan",
        model=needs.model.name,
        device=needs.device,
        weight_bytes=sum(needs.weight_bytes.values()),
        adapter_bytes=needs.adapter_bytes,
        kv_cache_bytes=share.cache_bytes,
        step_bytes=share.step_bytes,
        max_context=share.context,
        wanted_context=needs.context,
    )


def _make_client(engine: EngineSpec, share: ModelShare, present: PresentAdapters, turns: Turns) -> EngineClient:
    """An engine with the adapters that there are now."""
    plan = EnginePlan.of(share, present.sources, may_miss_adapters=present.were_loaded)
    present.were_loaded = True
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
