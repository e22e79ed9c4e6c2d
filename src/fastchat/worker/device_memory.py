"""Which device a worker computes on, and how much of its memory is free. Torch-free in the process that asks.

Only torch can tell of an accelerator, and asking one how much it has free costs memory there for as long as the asking
process lives. So a short-lived process asks: `python -m fastchat.worker.device_memory DEVICE`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastchat.errors import ConfigError
from fastchat.worker.config import Device
from fastchat.worker.host_memory import anonymous_bytes, available_bytes

ChosenDevice = Literal["cpu", "cuda", "mps"]

ASK_LIMIT_S = 120.0
ACCELERATOR_FILES = ("nvidia*", "nvhost*", "nvmap", "nvgpu", "dxg", "kfd")
"""In /dev of a Linux with a GPU that torch can use: NVIDIA's (also on a board), WSL's, AMD's."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A device and the bytes on it that are free; on a CPU those that this process holds already count as free."""

    device: ChosenDevice
    free_bytes: int


def find_device(wanted: Device, root: Path = Path("/")) -> DeviceMemory:
    """`auto` as what there is: CUDA, else Apple's GPU, else the CPU. Raises `ConfigError` for one that is absent."""
    if wanted == "cpu" or (wanted == "auto" and not may_have_accelerator(root)):
        return DeviceMemory("cpu", available_bytes(root) + anonymous_bytes())
    command = [sys.executable, "-m", "fastchat.worker.device_memory", wanted]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=ASK_LIMIT_S, check=False)  # noqa: S603 - our own module
        device, free_bytes = json.loads(answer.stdout)
    except (ValueError, subprocess.TimeoutExpired):
        raise ConfigError(
            f"--device {wanted}: torch could not say which devices there are; use --device cpu, or look at the output "
            f"of `{' '.join(command)}`."
        ) from None
    if device is None:
        raise ConfigError(f"--device {wanted}: torch finds no such device here; use --device cpu or auto.")
    if device == "cpu":
        return DeviceMemory("cpu", available_bytes(root) + anonymous_bytes())
    return DeviceMemory(device, free_bytes)


def may_have_accelerator(root: Path = Path("/")) -> bool:
    """False where there is surely none, which spares asking torch."""
    if sys.platform != "linux":
        return True
    return any(any((root / "dev").glob(pattern)) for pattern in ACCELERATOR_FILES)


def _ask_torch(wanted: str) -> tuple[ChosenDevice | None, int]:
    import torch  # for as long as this process lives

    if torch.cuda.is_available() and wanted in ("auto", "cuda"):
        return "cuda", torch.cuda.mem_get_info()[0]
    if torch.backends.mps.is_available() and wanted in ("auto", "mps"):
        return "mps", torch.mps.recommended_max_memory()
    return ("cpu", 0) if wanted == "auto" else (None, 0)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_ask_torch(sys.argv[1])))
