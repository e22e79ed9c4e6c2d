"""What to say where a plan does not fit: what is needed, what is there, and a change of the command that fits.

A change is named only after a plan with it was made and fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import structlog

from fastchat.errors import ConfigError
from fastchat.models.stored_form import Quantization, QuantizedName
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import DeviceMemory, find_device
from fastchat.worker.memory_plan import MARGIN, MemoryPlan, plan_memory, plan_turns
from fastchat.worker.model_needs import PlannedModel

SMALLEST_CONTEXT = 256
_GIB = 2**30

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Remedy:
    """Flags that make the same command fit when they are added, and the plan with them."""

    flags: str
    plan: MemoryPlan


def find_remedy(
    plan: MemoryPlan, models: Sequence[PlannedModel], engine: EngineSpec, memory: DeviceMemory
) -> Remedy | None:
    """The first change that fits, those that change the answers least first; None where none does."""
    for flags, changed in _changes(plan, engine):
        tried = plan_memory(models, changed, memory, each_alone=plan.each_alone)
        if tried.fits:
            return Remedy(flags, tried)
    return None


def plan_or_refuse(models: Sequence[PlannedModel], engine: EngineSpec, *, each_alone: bool = False) -> MemoryPlan:
    """The plan for models on this machine. Raises `ConfigError`, in one sentence, where it does not fit.

    With `each_alone` the plan is for one worker each where that fits, else for one worker with all of them. Models of
    one worker that do not fit together but some at a time take turns, and the log says so.
    """
    memory = find_device(engine.device)
    plan = plan_memory(models, engine, memory, each_alone=each_alone)
    if plan.fits:
        return plan
    sentence = refusal(plan, find_remedy(plan, models, engine, memory), memory)
    carried_out = plan_without_change(plan, models, engine, memory)
    if carried_out is None:
        raise ConfigError(sentence)
    if carried_out.num_awake:
        _log.warning("the models take turns in memory", at_once=carried_out.num_awake, why=sentence)
    return carried_out


def plan_without_change(
    plan: MemoryPlan, models: Sequence[PlannedModel], engine: EngineSpec, memory: DeviceMemory
) -> MemoryPlan | None:
    """How the same models are served where `plan` does not fit: in one worker, or in turns; None where not at all."""
    if plan.each_alone and len(models) > 1:
        together = plan_memory(models, engine, memory)
        if together.fits:  # one process takes less than several
            return together
    return plan_turns(models, engine, memory)


def refusal(plan: MemoryPlan, remedy: Remedy | None, memory: DeviceMemory) -> str:
    """Who needs what, what there is, and what fits."""
    names = ", ".join(share.needs.model.name for share in plan.shares)
    verb = "needs" if len(plan.shares) == 1 else "together need"
    facts = (
        f"{names} {verb} at least {gigabytes(plan.least_bytes)} of memory on device {plan.budget.device}, but the "
        f"budget is {gigabytes(plan.budget.num_bytes)} ({plan.budget.source})"
    )
    if remedy is not None:
        return f"{facts}; the same command with {remedy.flags} fits ({gigabytes(remedy.plan.least_bytes)})."
    if plan.least_bytes <= memory.free_bytes * (1 - MARGIN):
        return f"{facts}; the same command with {plan.budget.flag} {-(-plan.least_bytes // 2**20)}MiB fits."
    fewer = "use a smaller model" if len(plan.shares) == 1 else "serve fewer models"
    return f"{facts}, and no smaller form or context of it fits; {fewer}, or give more memory."


def gigabytes(num_bytes: int) -> str:
    """A size for reading, in both counts: flags take either."""
    return f"{num_bytes / 1e9:.2f} GB ({num_bytes / _GIB:.2f} GiB)"


def _changes(plan: MemoryPlan, engine: EngineSpec) -> Iterator[tuple[str, EngineSpec]]:
    forms = list(_smaller_forms(plan, engine))
    yield from forms
    for flags, changed in [("", engine), *forms]:
        for context in _smaller_contexts(plan):
            yield f"{flags} --max-context {context}".strip(), replace(changed, max_context=context)


def _smaller_forms(plan: MemoryPlan, engine: EngineSpec) -> Iterator[tuple[str, EngineSpec]]:
    is_float32 = any(share.needs.dtype == "float32" for share in plan.shares)
    dtypes = [("", engine), *([("--dtype bfloat16 ", replace(engine, dtype="bfloat16"))] if is_float32 else [])]
    if engine.quantization is None and is_float32:
        yield "--dtype bfloat16", dtypes[-1][1]
    if any(share.needs.model.footprint.stored is not None for share in plan.shares):
        return  # what is quantized on disk is not quantized again
    for name in _smaller_quantizations(engine.quantization):
        for flags, changed in dtypes:
            yield f"{flags}--quantize {name}", replace(changed, quantization=Quantization(name))


def _smaller_quantizations(quantization: Quantization | None) -> tuple[QuantizedName, ...]:
    if quantization is None:
        return ("int8", "int4")
    return ("int4",) if quantization.name == "int8" else ()


def _smaller_contexts(plan: MemoryPlan) -> Iterator[int]:
    """Halves of what must fit now."""
    context = 2 ** (max(share.needs.least_context for share in plan.shares).bit_length() - 1)
    while context > SMALLEST_CONTEXT:
        context //= 2
        yield context
