"""The page that `fastchat serve` starts: behind a proxy and keys, with models that sleep and workers that die."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from fastchat.ops.key_store import KEY_PREFIX
from tests.web.browser import OVER_THE_NETWORK, visiting
from tests.web.canary import call
from tests.web.conftest import API_KEY, PAIR

HELLO = "Hello! What is your name?"
A_KEY = re.compile(KEY_PREFIX + "[A-Za-z0-9_-]{16,}")


def read(url, **headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
        return answer.read().decode()


def test_fastchat_serve_starts_the_page_too(browser, serving):
    """One command to the page, named in the block that says what to do, also where a proxy shows it below a path."""
    with visiting(browser, serving.page_url) as visit:
        visit.open(f"/chat/?model={PAIR[1]}")
        assert "ChatGLM2-Demo" in visit.ask(HELLO)
        assert visit.models() == list(PAIR)


def test_the_page_has_a_key_and_its_visitors_have_none(serving):
    """The API server wants one from everybody else, and nothing that a browser is sent or a log keeps holds any."""
    with pytest.raises(urllib.error.HTTPError, match="401"):
        read(serving.api_url + "/v1/models")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        read(serving.api_url + "/v1/models", Authorization="Bearer EMPTY")
    sent = [read(f"{serving.page_url}/chat/{path}") for path in ("", "config", "page/models", "page/models.js")]
    assert PAIR[0] in sent[2]
    for text in (*sent, serving.process.log):
        assert not A_KEY.search(text)
        assert API_KEY not in text


@pytest.mark.parametrize(("host", "status"), [(OVER_THE_NETWORK, 200), ("evil.example", 403)])
def test_a_proxy_that_keeps_the_name_it_is_called_by(serving, host, status):
    """It is answered where `fastchat serve` was given the name."""
    assert call(urlsplit(serving.page_url).port, "GET", "/chat/page/models", host=host).status == status


def test_a_model_that_sleeps_says_so_and_wakes_for_a_message(browser, serving):
    """In the selectors of all tabs and beside the chat's; the message is answered as ever."""
    with visiting(browser, serving.page_url, locale="zh-CN") as visit:
        visit.open(f"/chat/?model={PAIR[0]}")
        visit.wait_for(lambda: visit.page.input_value("#model input") == PAIR[0], what="the model is chosen")
        serving.sleep(PAIR[0])
        visit.page.locator("#model-state", has_text=f"{PAIR[0]} 正在休眠").wait_for()
        assert visit.models() == [f"{PAIR[0]} （休眠）", PAIR[1]]
        assert "ChatGLM2-Demo" in visit.ask(HELLO)
        visit.wait_for(lambda: visit.models() == list(PAIR), what="it is awake")
        assert visit.page.locator("#model-state").inner_text() == ""


def test_a_worker_that_dies_in_a_battle_fails_on_its_own_side_alone(browser, serving):
    """The other side is answered, the notice names no model, and once the worker is back the next try works."""
    with visiting(browser, serving.page_url) as visit:
        visit.open("/chat/?arena")
        dying = serving.worker_pid(PAIR[1])
        os.kill(dying, signal.SIGSTOP)  # it can have said nothing when it dies
        try:
            visit.page.fill("#battle-message textarea", HELLO)
            visit.page.keyboard.press("Enter")
            answers = visit.page.locator("#battle-main [data-testid=bot]", has_text="ChatGLM2-Demo")
            answers.wait_for()
        finally:
            with contextlib.suppress(ProcessLookupError):  # on a slow machine its keeper has done so already
                os.kill(dying, signal.SIGKILL)
        notice = visit.page.locator("#battle-status .notice")
        notice.wait_for()
        visit.page.locator("body:not(.answering-battle)").wait_for()
        assert re.fullmatch("Model [AB]: this answer failed.*", notice.inner_text())
        assert not any(name in visit.page.locator("#battle-main").inner_text() for name in PAIR)
        assert not visit.page.locator("#battle-vote-a").is_visible()
        serving.process.wait_for_line(f"process is back.*worker of {PAIR[1]}")  # before, the list may be an old one
        visit.wait_for(
            lambda: json.loads(read(f"{serving.page_url}/chat/page/models"))["models"] == list(PAIR),
            what="the worker is back",
        )
        with visit.answering():
            visit.page.click("#battle-retry")
        visit.page.locator("#battle-vote-a").wait_for()
        assert answers.count() == 2
