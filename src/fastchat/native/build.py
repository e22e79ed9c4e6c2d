"""Builds the C++ kernels where a compiler is, and loads them; everywhere else pure torch is used.

The binding is a plain C interface called through ctypes: it compiles in seconds without torch's headers (which alone
take longer), needs no build tool and no Python headers, does not depend on torch's C++ ABI, and a call costs 1-2 us.
The threads are torch's: the library takes `GOMP_parallel` from the OpenMP that torch has loaded, because a second pool
would fight torch's for the cores. Where that symbol is missing the library does not load, and torch is used.

A library is built once per source, flags and compiler and kept in `$XDG_CACHE_HOME/fastchat/native` (`~/.cache` by
default). `FASTCHAT_NATIVE` chooses: 0 for pure torch, 1 (the default) for the best level this CPU has, or a level.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastchat.errors import ConfigError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
BASE_FLAGS = ("-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off")
VARIABLE = "FASTCHAT_NATIVE"
LEVELS = {
    "avx2": ("avx2", "fma", "f16c"),
    "avx512": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"),
    "avx512bf16": ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni", "avx512bf16"),
}
"""The instruction sets we build for, worst first: what a compiler calls them."""
BUILD_TIMEOUT_S = 600
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The element types of rows, and their numbers in vectors.h."""

_POINTER, _INTEGER, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "fastchat_multiply": (_INTEGER, *[_POINTER] * 4, *[_INTEGER] * 4),
    "fastchat_multiply_int8": (_INTEGER, *[_POINTER] * 5, *[_INTEGER] * 4),
    "fastchat_multiply_int4": (_INTEGER, *[_POINTER] * 5, *[_INTEGER] * 5),
    "fastchat_store_int8": (_INTEGER, *[_POINTER] * 3, *[_INTEGER] * 3),
    "fastchat_store_int4": (_INTEGER, *[_POINTER] * 3, *[_INTEGER] * 4),
    "fastchat_attend": (_INTEGER, *[_POINTER] * 11, *[_INTEGER] * 14, _FLOAT, _INTEGER),
    "fastchat_normalize": (_INTEGER, *[_POINTER] * 4, *[_INTEGER] * 4, _FLOAT, _INTEGER),
    "fastchat_add": (_INTEGER, *[_POINTER] * 2, *[_INTEGER] * 2),
    "fastchat_silu_and_multiply": (_INTEGER, *[_POINTER] * 2, *[_INTEGER] * 3),
    "fastchat_add_low_rank": (_INTEGER, *[_POINTER] * 3, *[_INTEGER] * 4),
    "fastchat_rotate": (_INTEGER, *[_POINTER] * 3, *[_INTEGER] * 7),
    "fastchat_replay": (_POINTER, _INTEGER, _INTEGER),
}


class NativeBuildError(RuntimeError):
    """The kernels cannot be had here; its text says why."""


Library = Any
"""A `ctypes.CDLL` with the functions of `_SIGNATURES`, or what takes their calls instead."""


class _Recording(threading.local):
    """What takes this thread's calls, while they are recorded."""

    library: Library | None = None


_recording = _Recording()


def kernels() -> Library | None:
    """The library for this CPU, built if need be on the first call; None where torch must do its work."""
    return _recording.library or loaded_library()


@contextmanager
def calls_go_to(recorder: Library) -> Iterator[None]:
    """This thread's calls of kernels, while the block lasts."""
    _recording.library = recorder
    try:
        yield
    finally:
        _recording.library = None


@functools.cache
def loaded_library() -> Library | None:
    choice = os.environ.get(VARIABLE, "1")
    if choice not in {"0", "1", *LEVELS}:
        raise ConfigError(f"{VARIABLE}={choice} is unknown; use 0, 1, {', '.join(LEVELS)}.")
    if choice == "0":
        return None
    try:
        return _load_first(levels_for(cpu_flags()) if choice == "1" else [choice])
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("native kernels are not used, pure torch is reason=%s", error)
        return None


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What this CPU can do, in the compiler's names, and its vendor; empty where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    facts = (line.partition(":")[2] for line in lines if line.startswith(("flags", "vendor_id")))
    return frozenset(" ".join(facts).replace("avx512_", "avx512").split())


def has_level(level: str, flags: frozenset[str]) -> bool:
    """Whether a CPU with these flags can run what is built for `level`."""
    return sys.platform == "linux" and flags.issuperset(LEVELS[level])


def levels_for(flags: frozenset[str]) -> list[str]:
    """The levels for a CPU with these flags, the fastest first. Raises NativeBuildError where it has none."""
    # Intel's bfloat16 instruction takes twice as long as widening to float32 (Sapphire Rapids), AMD's half as long.
    slow = {"avx512bf16"} if "AuthenticAMD" not in flags else set()
    levels = [level for level in reversed(LEVELS) if has_level(level, flags) and level not in slow]
    if not levels:
        raise NativeBuildError("the kernels are for x86 CPUs with AVX2 under Linux")
    return levels


def _load_first(levels: list[str]) -> ctypes.CDLL:
    """The first of these levels that the compiler can build: an old one does not know the newest instructions."""
    *better, last = levels
    for level in better:
        try:
            return load_library(level)
        except NativeBuildError as error:
            logger.info("native kernels are tried for an older CPU level=%s reason=%s", level, error)
    return load_library(last)


def load_library(level: str) -> ctypes.CDLL:
    """Build, or take from the cache, the library of a level. Raises NativeBuildError or OSError."""
    if not has_level(level, cpu_flags()):
        raise NativeBuildError(f"this CPU has no {level}")
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise NativeBuildError("there is no C++ compiler (g++ or clang++)")
    command = [compiler, *BASE_FLAGS, *(f"-m{name}" for name in LEVELS[level]), str(SOURCE)]
    path = cache_folder() / f"kernels-{_fingerprint(command)}.so"
    if not path.exists():
        _build(command, path)
    library = ctypes.CDLL(str(path))
    for name, argument_types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argument_types
        function.restype = None
    return library


def cache_folder() -> Path:
    """Where built libraries are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "fastchat" / "native"


def _fingerprint(command: list[str]) -> str:
    compiler = Path(command[0]).resolve()
    facts = (*command[:-1], str(compiler), str(compiler.stat().st_mtime_ns), torch.__version__)
    sources = b"".join(path.read_bytes() for path in (SOURCE, *sorted(SOURCE.parent.glob("*.h"))))
    return hashlib.sha256("\n".join(facts).encode() + sources).hexdigest()[:20]


def _build(command: list[str], path: Path) -> None:
    """Compile beside `path`, then rename: another process sees a whole library or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        built = subprocess.run(  # noqa: S603 - a compiler found on PATH, our own source
            [*command, "-o", str(unfinished)],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=BUILD_TIMEOUT_S,
            check=False,
        )
        if built.returncode:
            last_lines = " ".join(built.stderr.splitlines()[:2])
            raise NativeBuildError(f"{command[0]} failed: {last_lines}")
        unfinished.replace(path)
