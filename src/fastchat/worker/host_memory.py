"""How much memory this process holds, and may still take: of the machine, and of the container that it runs in."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUPS = (
    ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Folder and files of a container's limit, in version 2 and version 1 (Linux, Documentation/admin-guide/cgroup*)."""


def available_bytes(root: Path = Path("/")) -> int:
    """What can be taken without swapping. Cached files count as available: a checkpoint just read fills the cache."""
    left = [
        _machine_bytes(root),
        *(bytes_ for names in _CGROUPS if (bytes_ := _container_bytes(root, *names)) is not None),
    ]
    return max(0, min(left))


def anonymous_bytes(process: str = "self", root: Path = Path("/")) -> int:
    """What a process holds that no file backs; 0 where the system does not tell (not Linux)."""
    try:
        for line in (root / "proc" / process / "status").read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _machine_bytes(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _container_bytes(root: Path, folder: str, limit: str, usage: str, cache: str) -> int | None:
    """What a container's limit leaves, its cached files given back; None where there is no limit."""
    try:
        limit_bytes = int((root / folder / limit).read_text(encoding="ascii"))  # "max" is no number
        used_bytes = int((root / folder / usage).read_text(encoding="ascii"))
        counts = dict(line.split() for line in (root / folder / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return limit_bytes - used_bytes + int(counts.get(cache, 0))
