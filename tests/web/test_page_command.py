"""The command: its flags, its accounts, and what it does while models come and go."""

from __future__ import annotations

import re
import time
import urllib.parse

import pytest

from fastchat.errors import ConfigError
from fastchat.serve.gradio_web_server import create_page_parser, page_config
from fastchat.web.config import read_accounts
from tests.processes import START_LIMIT_S, free_port, run_command, start_command
from tests.web.browser import visiting
from tests.web.canary import call
from tests.web.conftest import DEMO, ENDLESS, SAME_ANSWERS

HELLO = "Hello! What is your name?"
CHINESE_FREE = re.compile(r"[A-Za-z]{3,}[^\u4e00-\u9fff]{20,}")  # an English sentence in a Chinese page
READY_LIMIT_S = 90.0
"""Ten on a machine that does nothing else."""


@pytest.mark.parametrize(
    "flags",
    [
        ("--moderate",),
        ("--show-terms-of-use",),
        ("--register-api-endpoint-file", "x.json"),
        ("--use-remote-storage",),
        ("--model-list-mode", "never"),
        ("--concurrency-count", "0"),
        ("--gradio-auth-path", "/nowhere"),
        ("--api-url", "nonsense"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_by_name(flags, capsys):
    """In a message that names the flag."""
    with pytest.raises((SystemExit, ConfigError)) as refusal:
        page_config(create_page_parser().parse_args(flags))
    assert flags[0] in (capsys.readouterr().err or str(refusal.value))


@pytest.mark.parametrize("flags", [("--share",), ("--gradio-root-path", "chat")])
def test_a_refused_flag_ends_the_command(flags, tmp_path):
    """One line, and the exit code of a wrong flag."""
    ended = run_command("gradio_web_server", *flags, state_dir=tmp_path)
    assert ended.returncode == 2
    assert flags[0] in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("text", ["alice:a:b, bob:c", "\ufeffalice:a:b\r\n\r\n bob:c \r\n", "alice:a:b\nbob:c"])
def test_a_file_of_accounts_from_any_editor(tmp_path, text):
    """Lines or commas, with either end of line, and with the mark that some editors put in front."""
    path = tmp_path / "accounts"
    path.write_bytes(text.encode())
    accounts = read_accounts(path)
    assert accounts.are_right("alice", "a:b")
    assert accounts.are_right("bob", "c")
    assert not accounts.are_right("alice", "a")


@pytest.mark.parametrize("text", ["", "alice", "alice:", ":a", "alice:a\nalice:b", "# nobody\n"])
def test_a_file_without_accounts_opens_nothing(tmp_path, text):
    """One line that names the file."""
    path = tmp_path / "accounts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        read_accounts(path)


def test_files_named_by_their_content_are_fetched_once(page_server):
    """A second visit asks for none of them; the page itself is never kept."""
    html = call(page_server.port, "GET", "/")
    script = re.search(r"\./(assets/[^\"]+\.js)", html.body.decode())[1]
    assert "immutable" in call(page_server.port, "GET", f"/{script}").headers["cache-control"]
    assert "immutable" not in html.headers.get("cache-control", "")


def login(port, name, password):
    body = urllib.parse.urlencode({"username": name, "password": password}).encode()
    return call(port, "POST", "/login", body, content_type="application/x-www-form-urlencoded")


def test_fastchat_s_flags_start_a_page_with_accounts(browser, tmp_path):
    """A FastChat command line starts in time, with the API server looked for on the controller's machine. Without a
    name and its password nothing can be asked; with them everything. A model that is still loading says so.
    """
    (tmp_path / "accounts").write_text("alice:correct horse\nbob:geheim,carol:密码\n", encoding="utf-8")
    flags = ("--controller-url", "http://127.0.0.1:21001", "--concurrency-count", "10", "--model-list-mode", "reload")
    assert page_config(create_page_parser().parse_args(flags)).api_url == "http://127.0.0.1:8000"
    flags += ("--gradio-auth-path", str(tmp_path / "accounts"), "--expect-models", '["later"]')
    controller = ("--controller-address", f"http://127.0.0.1:{free_port()}")
    with (
        start_command("openai_api_server", "--port", "0", *controller, state_dir=tmp_path) as api,
        start_command("gradio_web_server", "--port", "0", *flags, "--api-url", api.url, state_dir=tmp_path) as page,
    ):
        began = time.monotonic()
        port = page.port
        assert call(port, "GET", "/").status == 200
        assert time.monotonic() - began < READY_LIMIT_S
        page.wait_for_line("--host 0.0.0.0 opens the page to your network")
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
            log_in(visit)
            visit.page.fill("#message textarea", "not sent yet")
            visit.page.context.clear_cookies()  # the session ends
            log_in(visit)
            assert visit.page.input_value("#message textarea") == "not sent yet"
            visit.complaints = [
                each for each in visit.complaints if not each.startswith(("401", "error: Failed to load"))
            ]
            sees_what_is_waited_for(visit, api)
        assert "correct horse" not in page.log


def log_in(visit):
    visit.page.goto(visit.url)
    visit.page.locator("input[type=password]").fill("correct horse")
    visit.page.locator("input:not([type=password]), textarea").first.fill("alice")
    visit.page.locator("button").last.click()
    visit.wait_until_usable()


def sees_what_is_waited_for(visit, api):
    """The model that was announced and is not served, and then an API server that is gone."""
    visit.page.get_by_text("later: still loading. This page shows it as soon as it is ready.").wait_for()
    assert visit.models() == ["later (loading)"]
    visit.send(HELLO)
    visit.wait_for_notice("later is still loading; try again in a moment.")
    assert visit.page.input_value("#message textarea") == HELLO
    api.kill()
    visit.page.get_by_text("The API server does not answer").wait_for()


def test_the_page_says_that_no_model_is_served(visit):
    """The browser follows what it is told: nothing any more, then a model again."""
    told = {"models": [], "loading": [], "is_reachable": True}
    visit.page.route("**/page/models", lambda route: route.fulfill(json=told))
    visit.page.get_by_text("No model is served yet").wait_for()
    visit.send(HELLO)
    visit.wait_for_notice("No model is chosen")
    visit.page.unroute("**/page/models")
    visit.wait_for(lambda: visit.models() == [DEMO, ENDLESS], what="the models are back")


def test_a_model_appears_and_dies_in_the_middle_of_an_answer(visit, browser, page_server, system, endless_model):
    """The selectors follow without a reload; the page says what happened, what came stays, and the next try works.
    Beside another model, that one's answer is whole and the dead one's side says why it is not.
    """
    controller = f"http://127.0.0.1:{system.controller_flags[1]}"
    flags = ("--controller-address", controller, "--model-path", endless_model, "--model-names", "second")
    with start_command("model_worker", "--port", "0", *SAME_ANSWERS, *flags, state_dir=system.state_dir) as second:
        visit.wait_for(lambda: "second" in visit.models(), what="the second model", limit_s=START_LIMIT_S)
        visit.choose_model("second")
        visit.send(HELLO)
        visit.page.locator("#chat [data-testid=bot]").first.wait_for()
        with visiting(browser, page_server.url, locale="zh-CN") as other:
            other.open("/?compare")
            other.choose_model("second", "compare-model-b")
            other.page.fill("#compare-message textarea", HELLO)
            other.page.keyboard.press("Enter")
            other.page.locator("#compare-pane-b [data-testid=bot]").wait_for()
            second.kill()
            other.page.locator("#compare-status .notice", has_text="模型 B：").wait_for()
            other.page.locator("body:not(.answering-compare)").wait_for()
            assert "ChatGLM2-Demo" in other.page.locator("#compare-pane-a [data-testid=bot]").inner_text()
            assert not CHINESE_FREE.search(other.page.locator("#compare-status").inner_text())
            assert not other.page.locator("#compare-vote-a").is_visible()
            other.wait_for(lambda: "second" not in other.page.input_value("#compare-model-b input"), what="it is gone")
            other.limit_tokens("compare", 5)
            other.page.click("#compare-retry")
            other.page.locator("#compare-vote-a").wait_for()
        visit.wait_for_notice(re.compile("worker was lost|No worker can answer"))
    visit.wait_until_answered()
    assert visit.answers()[0].strip()
    visit.wait_for(lambda: visit.models() == [DEMO, ENDLESS], what="the second model is gone")
    assert visit.page.input_value("#model input") == DEMO
    with visit.answering():
        visit.page.locator("#status .notice button").click()
    visit.wait_for(lambda: "ChatGLM2-Demo" in "".join(visit.answers()), what="the other model's answer")
    assert visit.questions() == [HELLO]
