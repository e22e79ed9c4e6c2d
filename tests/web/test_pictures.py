"""The pictures of the README, taken from the running page; into docs/images where PICTURES=1 is set."""

from __future__ import annotations

import os

import pytest

from tests.processes import ROOT
from tests.web.browser import visiting
from tests.web.conftest import DEMO

MAX_BYTES = 150_000
LOCALES = {"en": "en-US", "zh": "zh-CN"}
HELLO = {"en": "Hello! What is your name?", "zh": "你好"}
QUESTIONS = {"en": "How do I start a worker?", "zh": "怎么启动一个 worker？"}
VOTES = ("a", "tie", "a", "b")


@pytest.fixture(params=LOCALES)
def language(request):
    return request.param


@pytest.fixture
def take(tmp_path, language):
    """Takes the picture of a page, small enough for a README that many load."""
    folder = ROOT / "docs" / "images" if os.environ.get("PICTURES") else tmp_path
    folder.mkdir(exist_ok=True)

    def take(visit, name):
        path = folder / f"{name}-{language}.png"
        visit.page.mouse.move(640, 20)
        visit.page.screenshot(path=path)
        assert 5_000 < path.stat().st_size < MAX_BYTES

    return take


def test_a_picture_of_the_chat(browser, page_server, language, take):
    """A conversation in each language."""
    with visiting(browser, page_server.url, locale=LOCALES[language]) as visit:
        visit.open(f"/?model={DEMO}")
        visit.ask(HELLO[language])
        visit.ask(QUESTIONS[language])
        take(visit, "chat")


def test_pictures_of_a_battle_and_the_leaderboard(browser, serving, language, take):
    """A round before its vote, and what votes make."""
    with visiting(browser, serving.page_url, locale=LOCALES[language]) as visit:
        visit.open("/chat/?arena")
        for number, vote in enumerate(VOTES):
            visit.page.fill("#battle-message textarea", HELLO[language] if number else QUESTIONS[language])
            with visit.answering():
                visit.page.keyboard.press("Enter")
            visit.page.locator("#battle-vote-a").wait_for()
            if number == 0:
                take(visit, "battle")
            visit.page.click(f"#battle-vote-{vote}")
            visit.page.locator("#battle-main .voted").wait_for()
        visit.open("/chat/?leaderboard")
        visit.page.locator("#leaderboard svg circle").first.wait_for()
        take(visit, "leaderboard")
