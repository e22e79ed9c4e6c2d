"""What this machine can do at most, measured: reading memory, multiplying matrices."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

READ_BYTES = 2**30
SIDE = 2048
REPEATS = 7
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "VNNI",
    "avx512_bf16": "AVX-512 bfloat16",
    "amx_bf16": "AMX",
}


@dataclass(frozen=True)
class Machine:
    """Described by what it can do, not by what it is called."""

    cores: int
    threads: int
    memory_gb: float
    instruction_sets: str
    torch: str
    read_gb_per_s: float
    bfloat16_gflop_per_s: float
    int8_gop_per_s: float
    load_average: float


def measure_machine(threads: int) -> Machine:
    """About five seconds."""
    torch.set_num_threads(threads)
    square = torch.ones(SIDE, SIDE, dtype=torch.bfloat16)
    whole = torch.ones(SIDE, SIDE, dtype=torch.int8)
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    return Machine(
        cores=os.cpu_count() or 1,
        threads=threads,
        memory_gb=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        instruction_sets=", ".join(name for flag, name in INSTRUCTION_SETS.items() if flag in flags),
        torch=torch.__version__,
        read_gb_per_s=read_rate(),
        bfloat16_gflop_per_s=2 * SIDE**3 / 1e9 / seconds_of(lambda: square @ square),
        # torch's public products of whole numbers do not use the CPU's instructions for them; this one does.
        int8_gop_per_s=2 * SIDE**3 / 1e9 / seconds_of(lambda: torch._int_mm(whole, whole)),  # noqa: SLF001
        load_average=os.getloadavg()[0],
    )


def read_rate() -> float:
    """GB/s at which torch adds up memory."""
    numbers = torch.ones(READ_BYTES // 4)
    return READ_BYTES / 1e9 / seconds_of(numbers.sum)


def seconds_of(call: Callable[[], object]) -> float:
    """The median of some calls, after one that warms up."""
    call()
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
