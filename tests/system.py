"""The whole system as real processes: controller, worker and API server on free ports, over small checkpoints."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoints import write_checkpoint
from tests.processes import ServerProcess, free_port, start_command

MODEL_NAME = "chatglm2-6b"
READY_LIMIT_S = 180.0


@dataclass(frozen=True)
class System:
    """The running processes. `controller_flags` start the controller again on the same port."""

    api: ServerProcess
    controller: ServerProcess
    worker: ServerProcess
    state_dir: Path
    controller_flags: tuple[str, ...]

    @property
    def api_url(self) -> str:
        return self.api.url

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.api_url + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Mapping[str, object]) -> dict:
        request = urllib.request.Request(
            self.api_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)

    def model_names(self) -> list[str]:
        return [card["id"] for card in self.get("/v1/models")["data"]]


@contextmanager
def running_system(
    folder: Path,
    *,
    family: str = "chatglm2",
    worker_module: str = "model_worker",
    worker_flags: Sequence[str | Path] = (),
    model_names: Sequence[str] = (MODEL_NAME,),
    environment: Mapping[str, str] | None = None,
) -> Iterator[System]:
    """Start everything, in an order that makes each wait for another; ready when the API server lists the models.

    Without `worker_flags` the worker serves a small checkpoint of `family` in a folder named like the first model.
    """
    state_dir = folder / "state"
    if not worker_flags:
        write_checkpoint(folder / model_names[0], family)
        # In float32 a text does not depend on the batch, whatever the processor and with or without a compiler.
        worker_flags = ("--model-path", folder / model_names[0], "--dtype", "float32")
    controller_flags = ("--port", str(free_port()))
    address = ("--controller-address", f"http://127.0.0.1:{controller_flags[1]}")
    with ExitStack() as processes:

        def start(module: str, *flags: str | Path) -> ServerProcess:
            process = start_command(module, *flags, state_dir=state_dir, environment=environment)
            return processes.enter_context(process)

        worker = start(worker_module, "--port", "0", *address, *worker_flags)
        api = start("openai_api_server", "--port", "0", *address)
        controller = start("controller", *controller_flags)
        system = System(api, controller, worker, state_dir, controller_flags)
        wait_for_models(system, model_names)
        yield system


def wait_for_models(system: System, names: Sequence[str], *, limit_s: float = READY_LIMIT_S) -> float:
    """Wait until the API server lists exactly these models; returns the seconds it took."""
    began = time.monotonic()
    seen: list[str] = []
    while time.monotonic() - began < limit_s:
        try:
            seen = system.model_names()
        except urllib.error.URLError:
            seen = []
        if sorted(seen) == sorted(names):
            return time.monotonic() - began
        time.sleep(0.05)
    logs = "\n".join(process.log for process in (system.worker, system.api, system.controller))
    raise AssertionError(f"the models are {seen}, not {names}, after {limit_s} s; the logs:\n{logs}")
