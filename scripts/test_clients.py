"""Real client libraries against the real system: each client in its own virtual environment under `.clients/`.

Starts controller, worker and API server on free ports with a small checkpoint, runs every program of `examples/` that
the table names, and ends with one line of counts. Environments are made once and kept.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.system import MODEL_NAME, System, running_system  # noqa: E402 - the tests are no installed package


@dataclass(frozen=True)
class Client:
    """One environment and the program that must end without an error in it."""

    name: str
    requirements: tuple[str, ...]
    command: tuple[str, ...]


CLIENTS = (
    Client("curl", (), ("bash", "examples/curl.sh")),
    Client("openai-0.28.1", ("openai==0.28.1",), ("python", "examples/openai_0_28.py")),
    Client("openai-1.x", ("openai==1.109.1",), ("python", "examples/openai_client.py")),
    Client("openai-2.x", ("openai>=2,<3",), ("python", "examples/openai_client.py")),
    Client("openai-3.x", ("openai>=3,<4",), ("python", "examples/openai_client.py")),
)


def main() -> int:
    """Run every client; 1 if any failed."""
    failures = []
    with tempfile.TemporaryDirectory() as folder, running_system(Path(folder)) as system:
        for client in CLIENTS:
            python = make_environment(client)
            began = time.monotonic()
            result = run(client, python, system)
            verdict = "passed" if result.returncode == 0 else "FAILED"
            print(f"{client.name:16} {verdict}  {time.monotonic() - began:5.1f} s", flush=True)
            if result.returncode:
                failures.append(client.name)
                print(result.stdout + result.stderr, flush=True)
    print(f"clients: {len(CLIENTS) - len(failures)} passed, {len(failures)} failed")
    return 1 if failures else 0


def make_environment(client: Client) -> Path:
    """The Python of the client's environment, installed on first use."""
    if not client.requirements:
        return Path(sys.executable)
    digest = hashlib.sha256("\n".join(client.requirements).encode()).hexdigest()[:8]
    folder = ROOT / ".clients" / f"{client.name}-{digest}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"{client.name}: making its environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *client.requirements], check=True)
        ready.touch()
    return python


def run(client: Client, python: Path, system: System) -> subprocess.CompletedProcess[str]:
    """The client's program, pointed at the system as a user would."""
    environment = os.environ | {
        "OPENAI_API_KEY": "EMPTY",
        "OPENAI_BASE_URL": system.api_url + "/v1",
        "OPENAI_API_BASE": system.api_url + "/v1",
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    return subprocess.run(
        [*client.command, MODEL_NAME],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


if __name__ == "__main__":
    sys.exit(main())
