"""The pictures of the README, taken from the running page; into docs/images where PICTURES=1 is set."""

from __future__ import annotations

import os

import pytest

from tests.processes import ROOT
from tests.web.browser import visiting
from tests.web.conftest import DEMO

MAX_BYTES = 200_000
QUESTIONS = {"en": ("en-US", "How do I start a worker?"), "zh": ("zh-CN", "怎么启动一个 worker？")}


@pytest.mark.parametrize("language", QUESTIONS)
def test_pictures_for_the_readme(browser, page_server, tmp_path, language):
    """A conversation in each language, small enough for a page that many load."""
    folder = ROOT / "docs" / "images" if os.environ.get("PICTURES") else tmp_path
    folder.mkdir(exist_ok=True)
    locale, question = QUESTIONS[language]
    with visiting(browser, page_server.url, locale=locale) as visit:
        visit.open(f"/?model={DEMO}")
        visit.ask("你好" if language == "zh" else "Hello! What is your name?")
        visit.ask(question)
        visit.page.mouse.move(640, 20)
        visit.page.screenshot(path=folder / f"chat-{language}.png")
    for picture in folder.glob("*.png"):
        assert 5_000 < picture.stat().st_size < MAX_BYTES
