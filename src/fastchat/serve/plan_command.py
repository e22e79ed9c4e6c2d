"""`fastchat plan PATH...`: what models will take of the memory, and whether it fits, from headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastchat.config import parse_bytes
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import create_parser, flag_type, run_command
from fastchat.serve.worker_arguments import add_engine_flags, engine_spec, obey_early_flags, positive
from fastchat.worker.config import EngineSpec, ModelSpec
from fastchat.worker.device_memory import DeviceMemory, find_device
from fastchat.worker.memory_plan import MemoryPlan, ModelShare, plan_memory
from fastchat.worker.memory_remedy import Remedy, find_remedy, gigabytes, plan_without_change, refusal
from fastchat.worker.model_groups import group_models, planned_group

EXIT_DOES_NOT_FIT = 1


def create_plan_parser() -> argparse.ArgumentParser:
    """The command's flags: how models are run, as every worker has them, and its own."""
    parser = create_parser(
        "plan_command",
        "What models will take of the memory, and whether it fits; reads the headers of their files and no weight.",
        epilog="Exit code 0: it fits. 1: it does not, though models may be served in turns. 2: a folder or a flag that "
        "no worker would take. A worker makes the same plan when it starts. With --max-gpu-memory the plan is for a "
        "GPU of that size, whether or not one is here.",
    )
    parser.prog = "fastchat plan"
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="folders of checkpoints, loaded together")
    parser.add_argument(
        "--one-worker-each",
        action="store_true",
        help="a worker process for each model, as `fastchat serve` has them (default: one worker with all of them)",
    )
    parser.add_argument(
        "--limit-worker-concurrency",
        type=flag_type(positive),
        metavar="N",
        help="answers computed at once (default: no limit but the scheduler's)",
    )
    parser.add_argument(
        "--adapter-memory",
        type=flag_type(parse_bytes),
        default=0,
        metavar="SIZE",
        help="memory kept free for each model's adapters that come later; a worker with --adapter-dir keeps 512MiB "
        "(default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="write JSON, sizes in bytes (default: for reading)")
    add_engine_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; returns the exit code. Raises `CheckpointError` or `ConfigError` for what no worker would take."""
    arguments = create_plan_parser().parse_args(argv)
    configure_logging("plan", level="ERROR")
    obey_early_flags(arguments)
    groups = group_models([ModelSpec(path) for path in arguments.paths], may_repeat=True)
    models = [planned_group(group) for group in groups]
    engine = replace(
        engine_spec(arguments, max_running=arguments.limit_worker_concurrency),
        adapter_reserve_bytes=arguments.adapter_memory,
    )
    memory = _memory(engine)
    plan = plan_memory(models, engine, memory, each_alone=arguments.one_worker_each)
    remedy = None if plan.fits else find_remedy(plan, models, engine, memory)
    carried_out = plan if plan.fits else plan_without_change(plan, models, engine, memory)
    verdict = "it fits" if plan.fits else f"{refusal(plan, remedy, memory)}{_served_all_the_same(carried_out)}"
    if arguments.json:
        facts = {"fits": plan.fits, "verdict": verdict, **as_json(plan), "remedy": _remedy_json(remedy)}
        facts["num_in_turns"] = carried_out.num_awake if carried_out else 0
        sys.stdout.write(json.dumps(facts, ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join([*as_lines(plan), "", verdict]) + "\n")
    return 0 if plan.fits else EXIT_DOES_NOT_FIT


def as_json(plan: MemoryPlan) -> dict[str, Any]:  # Any: JSON
    """The plan for a program; sizes in bytes, lengths in tokens."""
    return {
        "device": plan.budget.device,
        "budget_bytes": plan.budget.num_bytes,
        "budget_source": plan.budget.source,
        "least_bytes": plan.least_bytes,
        "total_bytes": plan.total_bytes,
        "process_bytes": plan.process_bytes,
        "models": [_share_json(share) for share in plan.shares],
    }


def as_lines(plan: MemoryPlan) -> Iterator[str]:
    """The plan for a person."""
    for share in plan.shares:
        needs = share.needs
        yield f"{needs.model.name} in {needs.model.path}"
        held = ", ".join(f"{_size(num_bytes)} in {form}" for form, num_bytes in needs.weight_bytes.items())
        yield _row("weights", sum(needs.weight_bytes.values()), held)
        if needs.adapter_bytes:
            yield _row("adapters", needs.adapter_bytes, "beside the weights")
        if needs.adapter_reserve_bytes:
            yield _row("adapters", needs.adapter_reserve_bytes, "kept free for those added later")
        yield _row("KV cache", share.cache_bytes, _cache_text(share))
        yield _row("a step", share.step_bytes, f"at its peak, of {needs.max_batch_tokens:,} tokens")
        yield _row("text", needs.model.text_bytes, "tokenizer and prompt format")
    yield "together"
    yield _row("processes", plan.process_bytes, "Python, torch and the other libraries")
    yield _row("all", plan.total_bytes, f"and at least {_size(plan.least_bytes)}")
    budget = plan.budget
    yield _row("budget", budget.num_bytes, f"{budget.source}, device {budget.device} ({gigabytes(budget.num_bytes)})")


def _memory(engine: EngineSpec) -> DeviceMemory:
    """A size of GPU memory can be planned for without a GPU; everything else is asked of this machine."""
    if engine.max_device_bytes is not None and engine.device in ("auto", "cuda"):
        return DeviceMemory("cuda", engine.max_device_bytes)
    return find_device(engine.device)


def _share_json(share: ModelShare) -> dict[str, Any]:  # Any: JSON
    needs = share.needs
    return {
        "name": needs.model.name,
        "path": str(needs.model.path),
        "dtype": needs.dtype,
        "quantize": needs.quantization.name if needs.quantization else None,
        "weight_bytes": sum(needs.weight_bytes.values()),
        "weight_bytes_by_form": dict(needs.weight_bytes),
        "adapter_bytes": needs.adapter_bytes,
        "adapter_reserve_bytes": needs.adapter_reserve_bytes,
        "kv_cache_bytes": share.cache_bytes,
        "kv_cache_bytes_per_token": needs.cache_bytes_per_token,
        "kv_cache_tokens": share.cache_tokens,
        "max_context": share.context,
        "wanted_context": needs.context,
        "num_full_sequences": share.num_full_sequences,
        "step_bytes": share.step_bytes,
        "text_bytes": needs.model.text_bytes,
    }


def _served_all_the_same(carried_out: MemoryPlan | None) -> str:
    """What a server does with models that do not fit as planned, where it serves them."""
    if carried_out is None:
        return ""
    if not carried_out.num_awake:
        return " As it is, one worker holds all of them."
    return f" As it is, they are served in turns: {carried_out.num_awake} in memory at a time, the others asleep."


def _remedy_json(remedy: Remedy | None) -> dict[str, Any] | None:  # Any: JSON
    return None if remedy is None else {"flags": remedy.flags, **as_json(remedy.plan)}


def _cache_text(share: ModelShare) -> str:
    needs = share.needs
    fitting = f"{share.cache_tokens:,} tokens of {needs.cache_bytes_per_token:,} bytes"
    if share.context < needs.context:
        return f"{fitting}; the context of {needs.context:,} is cut to {share.context:,}"
    sequences = "1 sequence" if share.num_full_sequences == 1 else f"{share.num_full_sequences:,} sequences"
    return f"{fitting}: {sequences} of the full context of {share.context:,}"


def _row(label: str, num_bytes: int, text: str) -> str:
    return f"  {label:<10} {_size(num_bytes):>10}  {text}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1e6:.2f} MB"


if __name__ == "__main__":
    run_command(main)
