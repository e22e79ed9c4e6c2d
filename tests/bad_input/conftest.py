"""The whole system with the reference checkpoint, and a second API server that has keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tests.bad_input.cases import COMPLETIONS, MODEL, Case
from tests.bad_input.http_rows import KEY
from tests.bad_input.sending import STREAMED, send
from tests.processes import ServerProcess, start_command
from tests.reference import FOLDER
from tests.system import System, running_system


@dataclass(frozen=True)
class Target:
    """The processes under attack, and the text that the streams beside must get."""

    system: System
    with_keys: ServerProcess
    streamed_text: str

    @property
    def port(self) -> int:
        return self.system.api.port


@pytest.fixture(scope="package")
def target(tmp_path_factory):
    """Needs the reference checkpoint: its context and vocabulary are what the cases count with."""
    if not FOLDER.exists():
        pytest.skip("the reference checkpoints are not beside the project")
    folder = tmp_path_factory.mktemp("target")
    flags = ("--model-path", FOLDER / MODEL, "--dtype", "float32")  # exact in any batch
    with running_system(
        folder, worker_flags=flags, model_names=(MODEL,), environment={"OMP_NUM_THREADS": "1"}
    ) as system:
        address = ("--controller-address", system.controller.url)
        with_keys = start_command(
            "openai_api_server", "--port", "0", *address, "--api-keys", KEY, state_dir=system.state_dir
        )
        with with_keys:
            answer = send(Case("alone", 200, body=STREAMED, path=COMPLETIONS), system.api.port)
            yield Target(system, with_keys, answer.document["choices"][0]["text"])
