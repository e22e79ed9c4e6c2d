"""A worker's life: load all models, register, serve, drain, close. One order for start and end, in one place."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import structlog

from fastchat.api.generation import RequestRecord
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection
from fastchat.errors import UnavailableError
from fastchat.models.shared_tensors import PROCESS_TENSORS
from fastchat.ops.metrics import EngineCondition, RequestFinished, WorkerMetrics
from fastchat.worker.adapter_control import AdapterControl
from fastchat.worker.config import WorkerConfig
from fastchat.worker.health import ENGINE_DIED, EngineHealth
from fastchat.worker.loaded_model import open_models
from fastchat.worker.model_control import ModelControl
from fastchat.worker.model_keeper import ModelKeeper

WATCH_INTERVAL_S = 1.0

_log = structlog.stdlib.get_logger(__name__)


class WorkerRuntime:
    """The living parts of one worker. `models`, `control` and what depends on them is there while `running` lasts.

    When an engine dies the worker leaves the cluster, `has_failed` is true and `end_process` is called, once: whoever
    runs the process ends it in order, as after a signal, and with a failure's exit code, so that it is started again.
    """

    control: ModelControl

    def __init__(
        self,
        config: WorkerConfig,
        *,
        clock: Callable[[], float] = time.monotonic,
        end_process: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.has_failed = False
        self._end_process = end_process
        self.worker_id = secrets.token_hex(8)
        self.models = ServedModels(())
        self.metrics = WorkerMetrics()
        self.health = EngineHealth((), clock, hang_after_s=config.hang_after_s)
        self._clock = clock
        self._loaded: list[ServedModel] = []
        self._connection: ControlConnection | None = None
        self._is_draining = False

    def __repr__(self) -> str:
        state = "draining" if self._is_draining else "serving"
        return f"<WorkerRuntime {self.worker_id} {state} {[model.names for model in self._loaded]}>"

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Load and register; leaving the block says goodbye and stops the engines.

        Requests in flight are ended by the HTTP server before that: `drain` first, then its grace, then this.
        """
        async with AsyncExitStack() as stack:
            await self._start_models(stack)
            if self.config.controller_address is not None:
                self._connection = self._make_connection(self.config.controller_address)
                await stack.enter_async_context(self._connection.keep_open())
            await stack.enter_async_context(self._watched_engines())
            names = ",".join(name for name, _ in self.models)
            _log.info("worker ready", address=self.config.address, models=names, worker_id=self.worker_id)
            yield
            await self.drain()

    async def drain(self) -> None:
        """Take no new request and tell the controller; what runs goes on."""
        self._is_draining = True
        if self._connection is not None:
            self._connection.drain()

    def check_accepting(self) -> None:
        """Raise `UnavailableError` while the worker drains."""
        if self._is_draining:
            raise UnavailableError("This worker is shutting down; send the request again.", code="shutting_down")

    def problem(self) -> str | None:
        """Why this worker should not get requests, in a phrase; None when it is well."""
        return self.health.problem() or ("draining" if self._is_draining else None)

    def note_record(self, record: RequestRecord) -> None:
        """Count an ended request, and send its final record to the controller."""
        usage = record.usage
        self.metrics.observe_request(
            RequestFinished(
                model=record.model,
                reason=record.reason,
                num_prompt_tokens=usage.num_prompt_tokens,
                num_cached_tokens=usage.num_cached_tokens,
                num_generated_tokens=usage.num_generated_tokens,
                duration_s=record.duration_s,
                time_to_first_token_s=record.time_to_first_token_s,
                inter_token_latencies_s=record.inter_token_latencies_s,
                num_awaited_tokens=record.num_awaited_tokens,
            )
        )
        if self._connection is not None:
            self._connection.add_record(
                request_id=record.request_id,
                tenant=record.tenant,
                model=record.model,
                num_prompt_tokens=usage.num_prompt_tokens,
                num_cached_tokens=usage.num_cached_tokens,
                num_generated_tokens=usage.num_generated_tokens,
                reason=record.reason,
            )

    def render_metrics(self) -> bytes:
        """Prometheus' text, with each engine's condition now."""
        for model in self._loaded:
            stats = model.engine.stats
            self.metrics.observe_engine(
                EngineCondition(
                    model=model.names[0],
                    num_running=stats.num_running,
                    num_waiting=stats.num_waiting,
                    num_queued_tokens=stats.num_queued_tokens,
                    kv_cache_usage=1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0,
                    num_preemptions=stats.num_preemptions,
                    num_steps=stats.num_steps,
                    num_drafted_tokens=stats.num_drafted_tokens,
                    num_accepted_tokens=stats.num_accepted_tokens,
                )
            )
        for condition in self.control.conditions():
            self.metrics.observe_place(condition.id, condition.state, held_bytes=condition.held_bytes)
        self.metrics.observe_shared_weights(PROCESS_TENSORS.saved_bytes)
        return self.metrics.render()

    async def _start_models(self, stack: AsyncExitStack) -> None:
        """One after the other, since they share the disk: the pinned first, the others while there is room."""
        opened_models = open_models(self.config, on_demand=True)
        assert opened_models.keeper is not None
        await stack.enter_async_context(opened_models.keeper.running())
        self._watch_keeper(opened_models.keeper)
        self.metrics.know_models(each_name for opened in opened_models.models for each_name in opened.all_names)
        started: dict[str, ServedModel] = {}
        for opened in sorted(opened_models.models, key=lambda each: set(each.names).isdisjoint(self.config.pinned)):
            started[opened.names[0]] = await opened.start(self.config)
        self._loaded += [started[opened.names[0]] for opened in opened_models.models]
        self.models = ServedModels(
            each
            for opened in opened_models.models
            for base in (started[opened.names[0]],)
            for each in (base, *opened.adapted(base))
        )
        adapters = AdapterControl(
            opened_models.keeper,
            self.models,
            opened_models.models,
            folder=self.config.adapter_dir,
            on_change=self._note_names,
        )
        await stack.enter_async_context(adapters.running())
        self.control = ModelControl(
            opened_models.keeper, self.models, adapters, worker_id=self.worker_id, address=self.config.address
        )
        self.health = EngineHealth(self._loaded, self._clock, hang_after_s=self.config.hang_after_s)

    def _watch_keeper(self, keeper: ModelKeeper) -> None:
        keeper.on_move = self._note_move
        keeper.on_load = self.metrics.observe_load
        keeper.on_leave = self.metrics.observe_unload

    def _make_connection(self, controller_address: str) -> ControlConnection:
        hello = Hello(worker_id=self.worker_id, address=self.config.address, models=self._model_entries())
        return ControlConnection(
            controller_address=controller_address,
            token=self.config.cluster_token,
            hello=hello,
            get_load=self._load,
        )

    def _model_entries(self) -> tuple[ModelEntry, ...]:
        return tuple(
            ModelEntry(
                name=name,
                max_context=model.max_context,
                created=model.created,
                alias_of="" if name == model.names[0] else model.names[0],
            )
            for name, model in self.models
        )

    def _load(self) -> Load:
        return self.health.load().model_copy(update={"states": self.control.states()})

    def _note_names(self) -> None:
        self.metrics.know_models(name for name, _ in self.models)
        if self._connection is not None:
            self._connection.announce(self._model_entries())

    def _note_move(self) -> None:
        if self._connection is not None:
            self._connection.report_now()

    @asynccontextmanager
    async def _watched_engines(self) -> AsyncIterator[None]:
        """Look at the engines each second while the block lasts, whether or not anybody asks for `/health`."""
        watch = asyncio.get_running_loop().create_task(self._watch_engines())
        try:
            yield
        finally:
            watch.cancel()
            with suppress(asyncio.CancelledError):
                await watch

    async def _watch_engines(self) -> None:
        """Say once what goes wrong. A dead engine ends the worker's part in the cluster; a hang may pass."""
        told: str | None = None
        while True:
            problem = self.health.problem()
            if problem is not None and problem != told:
                remedy = "this worker ends" if problem == ENGINE_DIED else "restart this worker"
                _log.error(f"{problem}; {remedy}", worker_id=self.worker_id)
            told = problem
            if not self.has_failed and not all(model.engine.is_alive for model in self._loaded):
                self.has_failed = True
                await self.drain()
                self._end_process()
            await asyncio.sleep(WATCH_INTERVAL_S)
