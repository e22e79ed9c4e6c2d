"""Building is safe and never a user's problem."""

import os
import subprocess
import sys

import pytest

from fastchat.errors import ConfigError
from fastchat.native import build

PROGRAM = """
import torch
from fastchat.native import build, products
rows, weight = torch.ones(2, 64), torch.ones(3, 64)
print(products.multiply(rows, weight).sum().item(), build.kernels() is not None)
"""


def run(folder, **variables):
    """What the program printed, with an own cache folder."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder), **variables}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)


def built_files(folder):
    return sorted(path.name for path in (folder / "fastchat" / "native").iterdir())


@pytest.mark.parametrize("form", ["avx2"], indirect=True)
def test_processes_that_build_at_once_share_one_library_and_a_broken_one_is_not_used(form, tmp_path):
    """Each process works, and one whole library is left, with nothing beside it; a file in the cache that does not load
    leaves torch at work.
    """
    children = [run(tmp_path, FASTCHAT_NATIVE="avx2") for _ in range(2)]
    assert [child.communicate()[0].split() for child in children] == [["384.0", "True"]] * 2
    (name,) = built_files(tmp_path)
    again = run(tmp_path, FASTCHAT_NATIVE="avx2")
    assert again.communicate()[0].split() == ["384.0", "True"]
    assert built_files(tmp_path) == [name]
    (tmp_path / "fastchat" / "native" / name).write_bytes(b"half a library")
    assert run(tmp_path, FASTCHAT_NATIVE="avx2").communicate()[0].split() == ["384.0", "False"]


@pytest.mark.parametrize(
    "hindrance",
    [
        {"FASTCHAT_NATIVE": "0"},
        {"PATH": "/nowhere"},
        {"XDG_CACHE_HOME": "/proc/no/such/folder"},
    ],
    ids=str,
)
def test_without_a_build_torch_does_the_work(tmp_path, hindrance):
    """Switched off, no compiler, no place to write: the answer is the same."""
    assert run(tmp_path, **hindrance).communicate()[0].split() == ["384.0", "False"]


@pytest.mark.parametrize(("cannot", "is_native"), [("-mavx512", "True"), ("-m", "False")])
@pytest.mark.parametrize("form", ["avx2"], indirect=True)
def test_an_old_compiler_builds_what_it_can(form, tmp_path, cannot, is_native):
    """One that does not know the newest instructions, and says so in an encoding of its own, builds for older ones."""
    compiler = tmp_path / "c++"
    compiler.write_text(
        f"""#!/bin/sh
case " $* " in *" {cannot}"*) printf 'unknown \\377' >&2; exit 1; esac
for last; do :; done
cp {build.kernels()._name} "$last"
"""
    )
    compiler.chmod(0o755)
    child = run(tmp_path, FASTCHAT_NATIVE="1", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert child.communicate()[0].split() == ["384.0", is_native]


def test_an_unknown_choice_is_an_error(monkeypatch):
    """A bad value of the variable is told, not ignored."""
    monkeypatch.setenv(build.VARIABLE, "sse9")
    build.loaded_library.cache_clear()
    with pytest.raises(ConfigError, match="sse9"):
        build.kernels()
    build.loaded_library.cache_clear()


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        ("fma f16c avx2 GenuineIntel", "avx2"),
        ("fma f16c avx2 avx512f avx512bw AuthenticAMD", "avx2"),
        (" ".join((*build.LEVELS["avx512"], "GenuineIntel")), "avx512"),
        (" ".join((*build.LEVELS["avx512bf16"], "GenuineIntel")), "avx512"),
        (" ".join((*build.LEVELS["avx512bf16"], "AuthenticAMD")), "avx512bf16"),
    ],
)
def test_the_best_level_is_chosen(flags, level):
    """A CPU gets the level that is fastest on it."""
    assert build.levels_for(frozenset(flags.split()))[0] == level
