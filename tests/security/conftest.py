"""A whole cluster with keys, as processes, and a listener that notices whoever is sent to it."""

from __future__ import annotations

import http.client
import json
import socketserver
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler

import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import ServerProcess, run_command, start_command

MODEL = "chatglm2-6b"
GIVEN_KEY = "sk-given-to-the-api-server"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: http.client.HTTPMessage
    text: str

    @property
    def error(self) -> dict:
        return json.loads(self.text)["error"]


class Cluster:
    """Controller, worker and API server; `key` was made by `fastchat keys`. The checkpoint names code to run."""

    def __init__(self, stack: ExitStack, folder) -> None:
        self.state_dir = folder / "state"
        self.code_ran = folder / "code-of-the-checkpoint-ran"
        model = write_checkpoint(folder / MODEL, "chatglm2", config={"auto_map": {"AutoModel": "canary.Model"}})
        (model / "canary.py").write_text(f"import os\nos.mkdir({str(self.code_ran)!r})\nclass Model: pass\n")
        self.key = run_command("keys_command", "create", state_dir=self.state_dir).stdout.strip()

        def start(module: str, *flags, **environment) -> ServerProcess:
            environment = {"OMP_NUM_THREADS": "1", **environment}
            return stack.enter_context(
                start_command(module, "--port", "0", *flags, state_dir=self.state_dir, environment=environment)
            )

        self.controller = start("controller")
        address = ("--controller-address", self.controller.url)
        self.worker = start("model_worker", "--model-path", model, *address)
        self.api = start("openai_api_server", *address, FASTCHAT_API_KEYS=GIVEN_KEY)
        self.token = (self.state_dir / "cluster-token").read_text().strip()
        self.worker.wait_for_line("registered with the controller")
        while self.call("/v1/models").text.count(MODEL) == 0:
            pass

    @property
    def processes(self) -> tuple[ServerProcess, ...]:
        return self.controller, self.worker, self.api

    @property
    def logs(self) -> str:
        return "\n".join(process.log for process in self.processes)

    def ask(self, process, method, path, body=None, *, bearer=None, headers=()) -> Reply:
        """One request to one process; `body` is JSON where it is no text or bytes. The path is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=60)
        sent = {} if bearer is None else {"Authorization": f"Bearer {bearer}"}
        body = body if isinstance(body, str | bytes | None) else json.dumps(body)
        connection._validate_path = lambda _path: None  # what a client of ours would not send
        try:
            connection.request(method, path, body, {"Content-Type": "application/json", **sent, **dict(headers)})
            answer = connection.getresponse()
            return Reply(answer.status, answer.headers, answer.read().decode())
        finally:
            connection.close()

    def call(self, path, body=None, *, key=None, **options) -> Reply:
        """The API server, with a good key."""
        method = "GET" if body is None else "POST"
        return self.ask(self.api, method, path, body, bearer=key or self.key, **options)

    def control(self, path, body=None, method="POST") -> Reply:
        """The controller, with the cluster token."""
        return self.ask(self.controller, method, path, body, bearer=self.token)

    def ask_keys(self, *words: str) -> str:
        """The output of `fastchat keys ...`."""
        return run_command("keys_command", *words, state_dir=self.state_dir).stdout

    def still_answers(self) -> bool:
        """A good request is answered as ever: what came before did no harm."""
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
        answer = self.call("/v1/completions", body)
        return answer.status == 200 and json.loads(answer.text)["usage"]["completion_tokens"] == 4


@pytest.fixture(scope="package")
def cluster(tmp_path_factory):
    with ExitStack() as stack:
        yield Cluster(stack, tmp_path_factory.mktemp("cluster"))


class Canary:
    """Listens on this machine and keeps the paths it was asked for; it sends everybody on to `redirect`."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.redirect = ""
        canary = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                canary.paths.append(self.path)
                self.send_response(302 if canary.redirect else 404)
                if canary.redirect:
                    self.send_header("Location", canary.redirect)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST = do_HEAD = answer  # noqa: N815 - http.server looks for these names

            def log_message(self, *_arguments):
                pass

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def canary():
    canary = Canary()
    yield canary
    canary.close()


@pytest.fixture
def second_canary():
    canary = Canary()
    yield canary
    canary.close()
