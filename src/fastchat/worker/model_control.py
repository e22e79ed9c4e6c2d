"""What operators see and do of a worker's models: their states, load, unload, sleep, wake, pin, unpin, and adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from fastchat.api.served_model import ServedModels
from fastchat.cluster.contract import ModelAction, ModelState
from fastchat.worker.adapter_control import AdapterControl
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.residency import Place, Resident

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ModelCondition:
    """One model now. Bytes are what its plan gives it: all it takes in memory, and what of that is taken now.

    `num_running` are sequences that hold it in memory, `num_waiting` those that wait for it to get there; `progress` is
    the share that has been read, from 0 to 1; `last_used` is in seconds since 1970.
    """

    id: str
    aliases: tuple[str, ...]
    adapters: tuple[str, ...]
    worker: str
    state: ModelState
    pinned: bool
    progress: float
    memory_bytes: int
    held_bytes: int
    num_running: int
    num_waiting: int
    last_used: int | None


@dataclass(frozen=True, slots=True)
class WorkerCondition:
    """The memory that a worker's models share; `used_bytes` are taken or being filled or freed."""

    id: str
    address: str
    budget_bytes: int
    used_bytes: int


class ModelControl:
    """Over the models that one keeper brings and frees."""

    def __init__(
        self, keeper: ModelKeeper, models: ServedModels, adapters: AdapterControl, *, worker_id: str, address: str
    ) -> None:
        self._keeper = keeper
        self._models = models
        self._adapters = adapters
        self._worker_id = worker_id
        self._address = address

    def condition(self) -> WorkerCondition:
        """The worker's memory now."""
        residency = self._keeper.residency
        return WorkerCondition(self._worker_id, self._address, residency.budget_bytes, residency.used_bytes)

    def conditions(self) -> list[ModelCondition]:
        """All models, in the order given."""
        return [self._condition(resident) for resident in self._keeper.residency]

    def states(self) -> dict[str, ModelState]:
        """The state of every name."""
        by_key = {resident.key: _state(resident) for resident in self._keeper.residency}
        return {name: by_key[model.engine_name] for name, model in self._models}

    async def act(self, name: str, action: ModelAction) -> ModelCondition:
        """Do it; returns when it is done, or for a model in use when it is arranged.

        Raises `ModelNotFoundError`, `ConflictError` for freeing a pinned one, `UnavailableError` for what does not fit,
        and what loading raises.
        """
        key = self._models.find(name).engine_name  # an adapter comes and goes with its base
        _log.info("model control", model=key, action=action)
        match action:
            case "load" | "wake":
                await self._keeper.wake(key)
            case "unload" | "sleep":
                await self._keeper.send_away(key)
            case "pin":
                await self._keeper.pin(key)
            case "unpin":
                self._keeper.residency.unpin(key)
                self._keeper.changed()
        return self._condition(self._keeper.residency.find(key))

    async def add_adapter(self, base: str, name: str, path: str) -> ModelCondition:
        """The base with the adapter. Raises as `AdapterControl.add`."""
        return self._condition(self._keeper.residency.find(await self._adapters.add(base, name, path)))

    async def remove_adapter(self, base: str, name: str) -> ModelCondition:
        """The base without the adapter. Raises as `AdapterControl.remove`."""
        return self._condition(self._keeper.residency.find(await self._adapters.remove(base, name)))

    def _condition(self, resident: Resident) -> ModelCondition:
        return ModelCondition(
            id=resident.key,
            aliases=self._aliases(resident.key),
            adapters=self._adapters.names_of(resident.key),
            worker=self._worker_id,
            state=_state(resident),
            pinned=resident.is_pinned,
            progress=round(self._keeper.load_progress(resident.key), 3),
            memory_bytes=resident.num_bytes,
            held_bytes=resident.num_bytes if resident.holds_memory else 0,
            num_running=resident.num_granted,
            num_waiting=self._keeper.residency.num_waiting(resident.key),
            last_used=self._last_used(resident),
        )

    def _aliases(self, key: str) -> tuple[str, ...]:
        return tuple(self._models.find(key).names[1:])

    def _last_used(self, resident: Resident) -> int | None:
        if not resident.was_used:
            return None
        idle_s = 0.0 if resident.num_granted else self._keeper.residency.clock() - resident.last_used_at
        return int(time.time() - idle_s)


def control_document(worker: WorkerCondition, models: Sequence[ModelCondition]) -> dict[str, object]:
    """The JSON of every route here; the API server's is the same, of all workers."""
    return {"object": "list", "data": list(models), "workers": [worker]}


def _state(resident: Resident) -> ModelState:
    if resident.place is Place.AWAKE and not resident.is_open:
        return "leaving"  # what runs on it ends in peace; newcomers wait
    states: dict[Place, ModelState] = {
        Place.ASLEEP: "asleep",
        Place.LOADING: "loading",
        Place.AWAKE: "awake",
        Place.LEAVING: "leaving",
    }
    return states[resident.place]
