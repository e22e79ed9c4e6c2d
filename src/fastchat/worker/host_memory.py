"""How much memory this process holds, and may still take: of the machine, and of the groups that limit it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_CGROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Controller, folder and files of a limit, in version 2 and version 1 (Linux, Documentation/admin-guide/cgroup*)."""


def available_bytes(root: Path = Path("/")) -> int:
    """What can be taken without swapping. Cached files count as available: a checkpoint just read fills the cache."""
    left = [
        _group_bytes(group, *files)
        for controller, folder, *files in _CGROUPS
        for group in _groups(root, controller, root / folder)
    ]
    return max(0, min([_machine_bytes(root), *(num_bytes for num_bytes in left if num_bytes is not None)]))


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


def _groups(root: Path, controller: str, top: Path) -> Iterator[Path]:
    """The group of processes that this one is in, and those around it: each may have a limit.

    In a container `top` is its own; under systemd or Slurm the group lies deeper.
    """
    group = top
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = top / path.lstrip("/")
    while group != top:
        yield group
        group = group.parent
    yield top


def _group_bytes(group: Path, limit: str, usage: str, cache: str) -> int | None:
    """What a group's limit leaves, its cached files given back; None where there is no limit."""
    try:
        limit_bytes = int((group / limit).read_text(encoding="ascii"))  # "max" is no number
        used_bytes = int((group / usage).read_text(encoding="ascii"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
    except (OSError, ValueError):
        return None
    return limit_bytes - used_bytes + int(counts.get(cache, 0))
