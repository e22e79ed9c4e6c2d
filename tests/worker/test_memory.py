"""How a worker divides memory: between its models, and with what else is there."""

import asyncio
from pathlib import Path

import pytest

from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig
from fastchat.worker.host_memory import available_bytes
from fastchat.worker.loaded_model import open_models

BYTES_PER_TOKEN = 2 * 2 * 2 * 12 * 4
MEMINFO = "MemTotal:       100 kB\nMemFree:          10 kB\nMemAvailable:   {} kB\n"


def write(root: Path, name: str, text: str) -> None:
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root: Path, available_kb: int) -> None:
    write(root, "proc/meminfo", MEMINFO.format(available_kb))


def test_cached_files_count_as_available(tmp_path: Path):
    """A checkpoint that was just read fills the page cache, which gives way."""
    machine(tmp_path, 50)
    assert available_bytes(tmp_path) == 50 * 1024


@pytest.mark.parametrize(
    ("folder", "limit", "usage", "cache"),
    [
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_limit_counts(tmp_path: Path, folder: str, limit: str, usage: str, cache: str):
    """What the container may still take, its own cached files given back; the smaller of both."""
    machine(tmp_path, 50)
    write(tmp_path, f"{folder}/{limit}", "20000\n")
    write(tmp_path, f"{folder}/{usage}", "15000\n")
    write(tmp_path, f"{folder}/memory.stat", f"anon 9000\n{cache} 4000\n")
    assert available_bytes(tmp_path) == 9000
    write(tmp_path, f"{folder}/{limit}", "max\n")
    assert available_bytes(tmp_path) == 50 * 1024
    write(tmp_path, f"{folder}/{limit}", "1000\n")
    assert available_bytes(tmp_path) == 0


def test_caches_of_all_models_together_leave_room(checkpoints):
    """On a CPU a cache takes memory only as it fills: each model's share is of what all of them will take."""
    models = tuple(ModelSpec(checkpoints["qwen"], (str(number),)) for number in range(4))
    spec = EngineSpec(device="cpu", dtype="float32", max_running=10**6)

    async def total_cache_bytes():
        opened = open_models(WorkerConfig(models, "http://127.0.0.1:1", "token", engine=spec))
        for model in opened:
            await model.engine.start()
        limits = [model.engine.limits for model in opened]
        for model in opened:
            await model.engine.close()
        return sum(each.num_blocks * each.block_size * BYTES_PER_TOKEN for each in limits)

    assert asyncio.run(total_cache_bytes()) <= min(0.5 * available_bytes(), 4 * 2**30)
