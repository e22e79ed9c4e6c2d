"""Which number type the weights are held in. Torch-free: a plan made before loading asks too."""

from __future__ import annotations

import logging
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from fastchat.errors import ConfigError
from fastchat.models.stored_form import FLOAT_BYTES, FloatName

DTypeName = Literal["auto", "float32", "bfloat16", "float16"]

_FLOATS: Mapping[str, FloatName] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Names in /proc/cpuinfo of arithmetic on bfloat16: x86 vectors, x86 tiles, Arm."""

logger = logging.getLogger(__name__)


def choose_dtype(
    name: DTypeName, *, device: str, config: Mapping[str, Any], stored: str
) -> FloatName:  # Any: JSON as it is on disk
    """`auto` is the checkpoint's own type on an accelerator, and what the processor computes fast on a CPU."""
    if name != "auto":
        if name not in FLOAT_BYTES:
            raise ConfigError(f"dtype {name!r} is not one of auto, {', '.join(FLOAT_BYTES)}")
        return name
    if device == "cpu":
        return "bfloat16" if has_fast_bfloat16() else "float32"
    declared = declared_dtype(config)
    return next((_FLOATS[each] for each in (declared, stored) if each in _FLOATS), "float32")


def declared_dtype(config: Mapping[str, Any]) -> str:  # Any: JSON as it is on disk
    """The type that config.json names, "" where it names none."""
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def warn_if_slow(dtype: FloatName, device: str) -> None:
    """Say so where the processor has to emulate the type."""
    if device == "cpu" and dtype == "float16":
        logger.warning("float16 is slow on this processor faster=%s", "bfloat16" if has_fast_bfloat16() else "float32")


def has_fast_bfloat16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor multiplies bfloat16 itself. Where there is no such file (not Linux), only Apple's can."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.system() == "Darwin" and "bf16" in _apple_features()
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return not BFLOAT16_FLAGS.isdisjoint(value.split())
    return False


def _apple_features() -> str:
    """`bf16` where macOS reports the processor's FEAT_BF16."""
    import subprocess  # macOS tells this by a command only

    command = ["/usr/sbin/sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)  # noqa: S603 - constant
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "bf16" if answer.stdout.strip() == "1" else ""
