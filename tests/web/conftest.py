"""The page on a running system: API server, controller, and a worker with the demo model and one that never ends."""

from __future__ import annotations

import re
import shutil
import urllib.request
from dataclasses import dataclass

import pytest
from playwright.sync_api import sync_playwright

from fastchat.serve.demo_model import DEMO_MODEL
from tests.checkpoints import write_checkpoint
from tests.processes import ServerProcess, start_command
from tests.system import running_system
from tests.web.browser import FLAGS, OVER_THE_NETWORK, SharedWindow
from tests.web.proxy import below_path

DEMO = "chatglm2-demo"
ENDLESS = "endless"
PAIR = ("demo-one", "demo-two")
SAME_ANSWERS = ("--seed", "1", "--dtype", "float32")
"""Of the workers: the page asks without a seed, and the demo model tells its name to most, not to all. In float32 text
depends neither on the processor nor on what else is computed.
"""
API_KEY = "a-key-that-clients-have"


@pytest.fixture(scope="package")
def browser():
    """Debian's Chromium, without a window."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert path, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def endless_model(tmp_path_factory):
    """A model whose answers go on until its context is full."""
    folder = tmp_path_factory.mktemp("models") / ENDLESS
    config = {"seq_length": 65536, "eos_token_id": 10**6}  # no token of its vocabulary ends an answer
    return write_checkpoint(folder, "chatglm2", config=config)


@pytest.fixture(scope="package")
def system(tmp_path_factory, endless_model):
    flags = ("--model-path", DEMO_MODEL, "--model-names", DEMO, "--model-path", endless_model, "--model-names", ENDLESS)
    with running_system(
        tmp_path_factory.mktemp("system"),
        worker_module="multi_model_worker",
        worker_flags=(*flags, *SAME_ANSWERS),
        model_names=(DEMO, ENDLESS),
        environment={"OMP_NUM_THREADS": "1"},
    ) as system:
        yield system


@pytest.fixture(scope="package")
def page_server(system):
    """`python3 -m fastchat.serve.gradio_web_server` on that system."""
    flags = ("--port", "0", "--api-url", system.api_url, "--allowed-hosts", f"{OVER_THE_NETWORK},FastChat.lan")
    with start_command("gradio_web_server", *flags, state_dir=system.state_dir) as process:
        process.url  # noqa: B018 - it waits until the page is there
        yield process
        assert "Traceback" not in process.log


@dataclass(frozen=True)
class Serving:
    """`fastchat serve` with an API key; `page_url` is that of a proxy which shows the page below /chat/."""

    process: ServerProcess
    page_url: str
    api_url: str

    def worker_pid(self, model):
        """The process that serves it now."""
        pids = re.findall(rf"process started.*worker of {model}\b.*pid=(\d+)", self.process.log)
        return int(pids[-1])

    def sleep(self, model):
        """Have its memory freed, as an operator."""
        request = urllib.request.Request(
            f"{self.api_url}/api/v1/models/{model}/sleep", b"", {"Authorization": f"Bearer {API_KEY}"}
        )
        urllib.request.urlopen(request).close()


@pytest.fixture(scope="package")
def serving(tmp_path_factory):
    """`fastchat serve` with the demo model under two names, in a process each."""
    ports = ("--port", "0", "--controller-port", "0", "--worker-port", "0", "--web-port", "0")
    models = [word for name in PAIR for word in ("--model-path", DEMO_MODEL, "--model-names", name)]
    page = ("--gradio-root-path", "/chat/", "--web-allowed-hosts", OVER_THE_NETWORK)
    flags = (*ports, *models, *page, "--api-keys", API_KEY, *SAME_ANSWERS)
    one_thread = {"OMP_NUM_THREADS": "1"}
    with start_command("launch", *flags, state_dir=tmp_path_factory.mktemp("serve"), environment=one_thread) as process:
        url = process.wait_for_line(r"^  page    (http://\S+)$")[1]
        api_url = process.wait_for_line(r"^  API     (http://\S+)/v1$")[1]
        with below_path("/chat", url) as proxy_url:
            yield Serving(process, proxy_url, api_url)


@pytest.fixture(scope="package")
def window(browser, page_server):
    """One window for all tests that need no special one."""
    window = SharedWindow(browser, page_server.url)
    yield window
    window.close()


@pytest.fixture
def visit(window):
    """The page as somebody sees it who comes for the first time."""
    with window.visiting() as visit:
        yield visit


@pytest.fixture
def num_running(system):
    """How many sequences the worker computes now, from its own metrics."""
    token = (system.state_dir / "cluster-token").read_text().strip()
    request = urllib.request.Request(system.worker.url + "/metrics", headers={"Authorization": f"Bearer {token}"})

    def count():
        with urllib.request.urlopen(request) as answer:
            text = answer.read().decode()
        values = re.findall(r"^fastchat_num_requests_(?:running|waiting)\S* (\S+)$", text, re.MULTILINE)
        assert values
        return sum(float(value) for value in values)

    return count
