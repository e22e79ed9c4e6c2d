"""Who gets how much memory, decided before a weight is read. Every command that loads models asks here. Torch-free.

    budget = processes + weights, text, steps and KV caches of all models

What the budget leaves beside weights and text is shared out as steps and KV caches: each model first gets the least
that will do, then all are raised to one level as far as each can use it. A plan that does not fit names a change of
the same command that does (`memory_remedy.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastchat.engine.engine_config import max_useful_blocks
from fastchat.errors import ConfigError
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import ChosenDevice, DeviceMemory
from fastchat.worker.model_needs import ModelNeeds, PlannedModel

MARGIN = 0.1
LEAST_MARGIN_BYTES = 512 * 2**20
"""What is left to others where no budget is given: this share of what is free, at least so much."""

CPU_PROCESS_BYTES = 290 * 2**20
CPU_ENGINE_BYTES = 60 * 2**20
"""Anonymous memory of Python with torch and transformers, and what torch sets up when it first computes."""
GPU_PROCESS_BYTES = 700 * 2**20
"""A context on a GPU with the libraries' kernels and workspaces, once for each process."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes for a whole worker, and where the number comes from, as a phrase."""

    device: ChosenDevice
    num_bytes: int
    source: str

    @property
    def flag(self) -> str:
        """The flag that sets it."""
        return "--memory" if self.device == "cpu" else "--max-gpu-memory"


@dataclass(frozen=True, slots=True)
class ModelShare:
    """What one model gets. `working_bytes` holds its steps and its KV cache."""

    needs: ModelNeeds
    working_bytes: int

    @property
    def context(self) -> int:
        """The longest sequence, in tokens; shorter than what was wanted where the memory ends before."""
        return self.needs.context_within(self.working_bytes)

    @property
    def cache_bytes(self) -> int:
        """The KV cache, in whole blocks; 0 where nothing fits."""
        needs, context = self.needs, self.context
        if context < 1:
            return 0
        left = self.working_bytes - needs.step_bytes(context)
        if needs.wanted_cache_bytes is not None:
            left = min(left, needs.wanted_cache_bytes)
        useful = max_useful_blocks(context, needs.max_running, needs.block_size)
        return min(useful, left // needs.block_bytes) * needs.block_bytes

    @property
    def cache_tokens(self) -> int:
        """The tokens that the KV cache holds, of all sequences together."""
        return self.cache_bytes // self.needs.block_bytes * self.needs.block_size

    @property
    def num_full_sequences(self) -> int:
        """Sequences of the longest context that the KV cache holds at once."""
        return self.cache_bytes // self.needs.cache_bytes(self.context) if self.context else 0

    @property
    def step_bytes(self) -> int:
        """What a step takes at its peak."""
        return self.needs.step_bytes(self.context)

    @property
    def total_bytes(self) -> int:
        """Everything but the process."""
        return self.needs.lasting_bytes + self.step_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What each model gets of a budget. `least_bytes` is the smallest budget that would do.

    `each_alone`: each model has a worker of its own, and the budget is for all workers together.
    """

    budget: Budget
    process_bytes: int
    shares: tuple[ModelShare, ...]
    least_bytes: int
    each_alone: bool = False
    num_awake: int = 0
    """How many of the largest models fit at once, where they take turns; 0: all are held together."""

    @property
    def fits(self) -> bool:
        """Whether the budget holds the least of every model."""
        return self.least_bytes <= self.budget.num_bytes

    @property
    def total_bytes(self) -> int:
        """The most that will be held."""
        return self.process_bytes + sum(share.total_bytes for share in self.shares)

    def own_budget(self, share: ModelShare) -> int:
        """The budget of one of the workers, where each model has its own."""
        return self.process_bytes // len(self.shares) + share.total_bytes


def budget_for(engine: EngineSpec, memory: DeviceMemory) -> Budget:
    """What the flags say, else what is free less a margin. Raises `ConfigError` for a flag of the other device."""
    wanted = {"--memory": engine.max_memory_bytes, "--max-gpu-memory": engine.max_device_bytes}
    flag, other = ("--memory", "--max-gpu-memory") if memory.device == "cpu" else ("--max-gpu-memory", "--memory")
    if wanted[other] is not None:
        raise ConfigError(f"{other} says nothing here, where models run on device {memory.device}; use {flag}.")
    num_bytes = wanted[flag]
    if num_bytes is not None:
        return Budget(memory.device, num_bytes, flag)
    margin = max(int(memory.free_bytes * MARGIN), LEAST_MARGIN_BYTES)
    return Budget(memory.device, max(0, memory.free_bytes - margin), "free, less a margin")


def plan_memory(
    models: Sequence[PlannedModel], engine: EngineSpec, memory: DeviceMemory, *, each_alone: bool = False
) -> MemoryPlan:
    """The plan for models that are run as `engine` says on the device of `memory`. Raises `ConfigError`."""
    budget = budget_for(engine, memory)
    needs = [ModelNeeds.of(model, engine, memory.device) for model in models]
    processes = _process_bytes(engine, memory.device, len(needs), each_alone=each_alone)
    lasting = processes + sum(each.lasting_bytes for each in needs)
    least = [each.least_working_bytes for each in needs]
    working = _levelled(budget.num_bytes - lasting, least, [each.most_working_bytes for each in needs])
    return MemoryPlan(
        budget=budget,
        process_bytes=processes,
        shares=tuple(ModelShare(each, num_bytes) for each, num_bytes in zip(needs, working, strict=True)),
        least_bytes=lasting + sum(least),
        each_alone=each_alone,
    )


def plan_turns(models: Sequence[PlannedModel], engine: EngineSpec, memory: DeviceMemory) -> MemoryPlan | None:
    """The plan for models that do not fit together but some at a time; None where not even the largest fits alone.

    As many as possible are in memory at once, whichever they are: what each gets is reckoned for the largest of them.
    """
    budget = budget_for(engine, memory)
    needs = [ModelNeeds.of(model, engine, memory.device) for model in models]
    processes = _process_bytes(engine, memory.device, len(needs), each_alone=False)
    least = sorted((each.lasting_bytes + each.least_working_bytes for each in needs), reverse=True)
    for num_awake in range(len(needs) - 1, 0, -1):
        if processes + sum(least[:num_awake]) > budget.num_bytes:
            continue
        room = (budget.num_bytes - processes) // num_awake
        shares = tuple(ModelShare(each, _working_bytes(each, room)) for each in needs)
        return MemoryPlan(budget, processes, shares, processes + sum(least[:num_awake]), num_awake=num_awake)
    return None


def _working_bytes(needs: ModelNeeds, room: int) -> int:
    return max(needs.least_working_bytes, min(room - needs.lasting_bytes, needs.most_working_bytes))


def _process_bytes(engine: EngineSpec, device: ChosenDevice, num_models: int, *, each_alone: bool) -> int:
    """What the processes take on the device before they hold a model."""
    has_engine_processes = engine.has_engine_process(device)
    if device != "cpu":
        return GPU_PROCESS_BYTES * (num_models if has_engine_processes or each_alone else 1)
    num_workers = num_models if each_alone else 1
    num_processes = num_workers + (num_models if has_engine_processes else 0)
    return CPU_PROCESS_BYTES * num_processes + CPU_ENGINE_BYTES * num_models


def _levelled(num_bytes: int, least: Sequence[int], most: Sequence[int]) -> list[int]:
    """At least `least` each, then as equal as `num_bytes` allows, no one more than it can use."""
    low, high = 0, max([0, *most])
    while low < high:
        level = (low + high + 1) // 2
        given = [max(floor, min(level, ceiling)) for floor, ceiling in zip(least, most, strict=True)]
        low, high = (level, high) if sum(given) <= num_bytes else (low, level - 1)
    return [max(floor, min(low, ceiling)) for floor, ceiling in zip(least, most, strict=True)]
