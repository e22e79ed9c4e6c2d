"""The command: its flags, its accounts, and what it does while models come and go."""

from __future__ import annotations

import re
import time
import urllib.parse

import pytest

from fastchat.serve.demo_model import DEMO_MODEL
from tests.processes import free_port, run_command, start_command
from tests.system import running_system
from tests.web.browser import visiting
from tests.web.canary import call

HELLO = "Hello! What is your name?"
READY_LIMIT_S = 30.0
"""Ten on a machine that does nothing else."""


@pytest.mark.parametrize(
    "flags",
    [
        ("--share",),
        ("--moderate",),
        ("--show-terms-of-use",),
        ("--register-api-endpoint-file", "x.json"),
        ("--use-remote-storage",),
        ("--model-list-mode", "never"),
        ("--concurrency-count", "0"),
        ("--gradio-auth-path", "/nowhere"),
        ("--gradio-root-path", "chat"),
        ("--api-url", "nonsense"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(flags, tmp_path):
    """One line that names the flag, and the exit code of a wrong flag."""
    ended = run_command("gradio_web_server", *flags, state_dir=tmp_path)
    assert ended.returncode == 2
    assert flags[0] in ended.stderr.splitlines()[-1]


def test_fastchat_s_flags_lead_to_the_api_server(tmp_path):
    """A FastChat command line starts; the controller's machine is where the API server is looked for."""
    flags = ("--controller-url", "http://127.0.0.1:21001", "--concurrency-count", "10", "--model-list-mode", "reload")
    began = time.monotonic()
    with start_command("gradio_web_server", "--port", "0", *flags, state_dir=tmp_path) as page:
        page.wait_for_line(r"api_url=http://127.0.0.1:8000")
        page.wait_for_line("--host 0.0.0.0 opens the page to your network")
        assert call(page.port, "GET", "/").status == 200
        assert time.monotonic() - began < READY_LIMIT_S


def login(port, name, password):
    body = urllib.parse.urlencode({"username": name, "password": password}).encode()
    return call(port, "POST", "/login", body, content_type="application/x-www-form-urlencoded")


def test_accounts_decide_who_may_use_the_page(browser, tmp_path):
    """Without a name and its password nothing can be asked; with them everything."""
    (tmp_path / "accounts").write_text("alice:correct horse\nbob:geheim,carol:密码\n", encoding="utf-8")
    flags = ("--gradio-auth-path", tmp_path / "accounts", "--api-url", f"http://127.0.0.1:{free_port()}")
    with start_command("gradio_web_server", "--port", "0", *flags, state_dir=tmp_path) as page:
        port = page.port
        body = b'{"data": [], "fn_index": 0, "session_hash": "a"}'
        for name, password in (("alice", "wrong"), ("nobody", "correct horse"), ("bob", "correct horse")):
            assert login(port, name, password).status == 400
        for method, path in (
            ("POST", "/gradio_api/queue/join"),
            ("GET", "/gradio_api/queue/data?session_hash=a"),
            ("GET", "/config"),
            ("GET", "/page/models"),
            ("POST", "/gradio_api/cancel"),
        ):
            headers = {"content_type": "application/json"} if method == "POST" else {}
            assert call(port, method, path, body if method == "POST" else b"", **headers).status == 401, path
        for name, password in (("alice", "correct horse"), ("bob", "geheim"), ("carol", "密码")):
            assert login(port, name, password).status == 200
        with visiting(browser, f"http://127.0.0.1:{port}") as visit:
            visit.page.goto(visit.url)
            visit.page.locator("input[type=password]").fill("correct horse")
            visit.page.locator("input:not([type=password]), textarea").first.fill("alice")
            visit.page.locator("button").last.click()
            visit.wait_until_usable()
            visit.complaints = [
                each for each in visit.complaints if not each.startswith(("401", "error: Failed to load"))
            ]
        assert "correct horse" not in page.log


def test_a_model_appears_goes_and_comes_back_without_a_reload(browser, tmp_path):
    """The selector follows; a worker that dies mid-answer is told of, what came stays, and the next try works."""
    flags = ("--model-path", DEMO_MODEL, "--model-names", "first")
    with running_system(tmp_path, worker_flags=flags, model_names=("first",)) as system:
        page_flags = ("--port", "0", "--api-url", system.api_url)
        controller = f"http://127.0.0.1:{system.controller_flags[1]}"
        worker_flags = ("--port", "0", "--controller-address", controller, "--model-path", DEMO_MODEL, "--model-names")

        def start_worker(name):
            return start_command("model_worker", *worker_flags, name, state_dir=system.state_dir)

        with (
            start_command("gradio_web_server", *page_flags, state_dir=system.state_dir) as page,
            visiting(browser, page.url) as visit,
        ):
            visit.open()
            visit.wait_for(lambda: visit.page.input_value("#model input") == "first", what="the first model")
            with start_worker("second") as second:
                visit.wait_for(lambda: visit.models() == ["first", "second"], what="the second model", limit_s=40)
                visit.choose_model("second")
                visit.send(HELLO)
                visit.page.locator("#chat [data-testid=bot]").first.wait_for()
                second.kill()
                visit.wait_for_notice(re.compile("worker was lost|No worker can answer"))
                visit.wait_until_answered()
                begun = visit.answers()
                assert begun
                visit.wait_for(lambda: visit.models() == ["first"], what="the second model is gone")
            with start_worker("second"):
                visit.wait_for(lambda: "second" in visit.models(), what="the second model is back", limit_s=40)
                visit.choose_model("second")
                visit.page.locator("#status .notice button").click()
                visit.page.locator("body.answering").wait_for()
                visit.wait_until_answered()
                assert visit.questions() == [HELLO]
                assert len(visit.answers()[0]) > len(begun[0])
            system.worker.kill()
            visit.page.get_by_text("No model is served yet").wait_for()
            system.api.kill()
            visit.page.get_by_text("The API server does not answer").wait_for()


def test_fastchat_serve_starts_the_page_too(browser, tmp_path):
    """One command to the page, named in the block that says what to do; `--no-web` leaves it out."""
    ports = ("--port", "0", "--controller-port", "0", "--worker-port", "0", "--web-port", "0")
    with start_command("launch", *ports, state_dir=tmp_path) as serving:
        url = serving.wait_for_line(r"^  page    (http://\S+)$", limit_s=90)[1]
        with visiting(browser, url) as visit:
            assert visit.open().ask(HELLO)
