"""Real client libraries against the real system: each client in its own virtual environment under `.clients/`.

Starts controller, worker and API server on free ports with a small checkpoint, runs every program of `examples/` that
the table names, and ends with one line of counts. Environments are made once and kept, with the versions of
`examples/constraints.txt`. Names of clients as arguments run those alone.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "examples" / "constraints.txt"
sys.path.insert(0, str(ROOT))

from tests.failing_server import FAILING_MODELS, registered_failing_server  # noqa: E402 - the tests are no installed package
from tests.processes import ServerProcess, free_port, start_command  # noqa: E402 - the tests are no installed package
from tests.system import MODEL_NAME, System, running_system, wait_for_models  # noqa: E402 - the tests are no installed package


@dataclass(frozen=True)
class Client:
    """One environment and the programs that must end without an error in it."""

    name: str
    requirements: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


GUIDE = "examples/chatglm.py"
GUIDE_HOSTS = ("http://yourserverip:8000", "http://hostserver:8000")
"""The addresses in the guide's program, the only words of it that are changed here."""

OLD, FIRST, SECOND, THIRD = (f"openai=={version}" for version in ("0.28.1", "1.109.1", "2.54.0", "3.54.0"))
CLIENT, ERRORS = ("python", "examples/openai_client.py"), ("python", "examples/openai_errors.py")
CLIENTS = (
    Client("curl", (), (("bash", "examples/curl.sh"),)),
    Client("openai-0.28.1", (OLD,), (("python", GUIDE), ("python", "examples/openai_0_28.py"))),
    Client("openai-1.x", (FIRST,), (CLIENT, ERRORS)),
    Client("openai-2.x", (SECOND,), (CLIENT, ERRORS)),
    Client("openai-3.x", (THIRD,), (CLIENT, ERRORS)),
    Client("langchain-openai", ("langchain-openai==1.7.3", THIRD), (("python", "examples/langchain_client.py"),)),
    Client("litellm", ("litellm==1.106.2", SECOND), (("python", "examples/litellm_client.py"),)),
)


def main() -> int:
    """Run every client, or those named; 1 if any failed."""
    clients = [client for client in CLIENTS if client.name in (sys.argv[1:] or client.name)]
    failures = []
    with tempfile.TemporaryDirectory() as folder, running_servers(Path(folder)) as servers:
        for client in clients:
            python = make_environment(client)
            for command in client.commands:
                began = time.monotonic()
                result = run(command, python, servers)
                verdict = "passed" if result.returncode == 0 else "FAILED"
                print(f"{client.name:16} {command[1]:28} {verdict}  {time.monotonic() - began:5.1f} s", flush=True)
                if result.returncode:
                    failures.append(client.name)
                    print(result.stdout + result.stderr, flush=True)
    print(f"clients: {len(clients) - len(set(failures))} passed, {len(set(failures))} failed")
    return 1 if failures else 0


@dataclass(frozen=True)
class Servers:
    """The system with models that fail, an API server without a controller, which answers 503, and one with a key."""

    system: System
    busy: ServerProcess
    with_keys: ServerProcess


@contextmanager
def running_servers(folder: Path) -> Iterator[Servers]:
    """All of them, ready."""
    with running_system(folder) as system, ExitStack() as processes:

        def start(controller_url: str, *flags: str) -> ServerProcess:
            flags = ("--port", "0", "--controller-address", controller_url, *flags)
            return processes.enter_context(start_command("openai_api_server", *flags, state_dir=system.state_dir))

        busy = start(f"http://127.0.0.1:{free_port()}")
        with_keys = start(system.controller.url, "--api-keys", "a-key-of-this-test")
        token = (system.state_dir / "cluster-token").read_text(encoding="ascii").strip()
        processes.enter_context(registered_failing_server(system.controller.url, token))
        wait_for_models(system, (MODEL_NAME, *FAILING_MODELS))
        yield Servers(system, busy, with_keys)


def make_environment(client: Client) -> Path:
    """The Python of the client's environment, installed on first use."""
    if not client.requirements:
        return Path(sys.executable)
    digest = hashlib.sha256("\n".join([*client.requirements, CONSTRAINTS.read_text()]).encode()).hexdigest()[:8]
    folder = ROOT / ".clients" / f"{client.name}-{digest}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if not ready.exists():
        print(f"{client.name}: making its environment", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS, *client.requirements], check=True
        )
        ready.touch()
    return python


def run(command: tuple[str, ...], python: Path, servers: Servers) -> subprocess.CompletedProcess[str]:
    """A program, pointed at the system as a user would."""
    url = servers.system.api_url
    environment = os.environ | {
        "OPENAI_API_KEY": "EMPTY",
        "OPENAI_BASE_URL": url + "/v1",
        "OPENAI_API_BASE": url + "/v1",
        "FASTCHAT_BUSY_URL": servers.busy.url + "/v1",
        "FASTCHAT_KEYS_URL": servers.with_keys.url + "/v1",
        "FASTCHAT_FAILING_MODELS": ",".join(FAILING_MODELS),
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
    }
    with tempfile.TemporaryDirectory() as folder:
        if command[-1] == GUIDE:
            command = (*command[:-1], str(guide_program(Path(folder), url)))
        return subprocess.run(
            [*command, MODEL_NAME],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )


def guide_program(folder: Path, url: str) -> Path:
    """The guide's program with our address in place of its two, and its function called once."""
    text = (ROOT / GUIDE).read_text(encoding="utf-8")
    for host in GUIDE_HOSTS:
        if host not in text:
            raise SystemExit(f"{GUIDE} no longer has the address {host}")
        text = text.replace(host, url)
    program = folder / Path(GUIDE).name
    program.write_text(text + 'print(chat([{"role": "user", "content": "你是谁？"}]))\n', encoding="utf-8")
    return program


if __name__ == "__main__":
    sys.exit(main())
