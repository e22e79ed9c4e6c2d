"""How much memory there is, and how much a process holds."""

from pathlib import Path

import pytest

from fastchat.worker.host_memory import anonymous_bytes, available_bytes

V1_FILES = ("memory.limit_in_bytes", "memory.usage_in_bytes")
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


@pytest.mark.parametrize(
    ("line", "top", "limit", "usage"),
    [
        ("0::/system.slice/fastchat.service", "sys/fs/cgroup", "memory.max", "memory.current"),
        ("4:memory:/system.slice/fastchat.service", "sys/fs/cgroup/memory", *V1_FILES),
        ("7:cpu,memory:/system.slice/fastchat.service", "sys/fs/cgroup/memory", *V1_FILES),
    ],
)
@pytest.mark.parametrize("limited", ["", "system.slice", "system.slice/fastchat.service"])
def test_a_limit_of_the_service_or_of_what_it_belongs_to_counts(
    tmp_path: Path, line: str, top: str, limit: str, usage: str, limited: str
):
    """systemd's MemoryMax and a job of Slurm's limit a group below the top of the tree, which has no limit itself."""
    machine(tmp_path, 50)
    write(tmp_path, "proc/self/cgroup", f"1:name=systemd:/\n{line}\n")
    for folder, size in (("other", 1), (limited, 20000)):
        write(tmp_path, f"{top}/{folder}/{limit}", f"{size}\n")
        write(tmp_path, f"{top}/{folder}/{usage}", "15000\n")
        write(tmp_path, f"{top}/{folder}/memory.stat", "anon 9000\n")
    assert available_bytes(tmp_path) == 5000


def test_anonymous_memory_is_what_no_file_backs(tmp_path: Path):
    """As the system counts it; nothing where it does not tell."""
    write(tmp_path, "proc/self/status", "VmRSS:\t 900 kB\nRssAnon:\t     700 kB\nRssFile:\t 200 kB\n")
    assert anonymous_bytes(root=tmp_path) == 700 * 1024
    assert anonymous_bytes("1", root=tmp_path) == 0
