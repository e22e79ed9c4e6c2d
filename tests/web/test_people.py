"""For people: two languages, small windows, dark rooms, keyboards, and names for what a screen reader meets."""

from __future__ import annotations

import re

import pytest

from fastchat.errors import UnavailableError
from fastchat.web.failures import failure_of
from fastchat.web.translation import LANGUAGES, texts, translate
from tests.web.browser import visiting

CHINESE = re.compile(r"[\u4e00-\u9fff]")
NAMES = re.compile(r"\{(\w+)\}")
SAME_IN_BOTH = {"title", "top_p"}
OF_THE_OTHER = {"language", "language_label"}


@pytest.mark.parametrize("key", sorted(texts("en")))
def test_every_text_is_there_in_both_languages(key):
    """With the same facts in it, and really in its language."""
    english, chinese = texts("en")[key], texts("zh")[key]
    assert set(NAMES.findall(english)) == set(NAMES.findall(chinese))
    if key in OF_THE_OTHER:
        english, chinese = chinese, english
    assert not CHINESE.search(english)
    assert key in SAME_IN_BOTH or CHINESE.search(chinese)


def test_both_tables_have_the_same_keys():
    """A text is added to both or to none."""
    assert [sorted(texts(language)) for language in LANGUAGES] == [sorted(texts("en"))] * 2


def test_facts_with_braces_stay_as_they_are():
    """What a server said is never taken for a place to fill in."""
    assert translate("en", "error_other", detail="{model}", model="x") == "The answer failed: {model}"


@pytest.mark.parametrize(
    "code", ["arena_busy", "arena_unavailable", "worker_unreachable", "shutting_down", "no_worker", "worker_lost"]
)
def test_what_passes_is_told_in_the_reader_s_language(code):
    """The server's own sentence is English."""
    text = failure_of(UnavailableError("In English.", code=code), "m").text("zh")
    assert CHINESE.search(text)
    assert "English" not in text


def visible_text(visit):
    return visit.page.evaluate(
        "[...document.querySelectorAll('button, label, textarea, input, [aria-label], nav, p, span')]"
        ".map(e => [e.innerText, e.ariaLabel, e.title, e.placeholder].join(' ')).join('\\n')"
    )


def test_a_chinese_browser_gets_a_chinese_page(browser, page_server):
    """Labels, hints, names for screen readers, and errors."""
    with visiting(browser, page_server.url, locale="zh-CN") as visit:
        visit.open()
        visit.open_settings()
        assert visit.page.locator("#send").inner_text() == "发送"
        visit.set_number("seed", "abc")
        visit.send("你好")
        visit.wait_for_notice("随机种子是整数，或留空。")
        visit.set_number("seed", "")
        visit.ask("你好")
        text = visible_text(visit)
        for english in (
            "Copy message",
            "Retry",
            "Undo",
            "Edit",
            "Clear",
            "Settings",
            "Temperature",
            "Send",
            "message:",
        ):
            assert not re.search(rf"\b{english}\b", text), english


def test_the_language_can_be_switched_and_is_remembered(visit):
    """By hand, over the browser's own."""
    visit.page.click("#language-switch")
    visit.page.locator("#send", has_text="发送").wait_for()
    visit.reload()
    visit.page.locator("#send", has_text="发送").wait_for()
    assert visit.page.evaluate("document.documentElement.lang") == "zh-CN"
    visit.send("word " * 5000)
    visit.wait_for_notice("超出了这个模型的上下文长度")
    visit.wait_until_answered()


def test_light_and_dark_follow_the_system_and_the_switch(browser, page_server):
    """The switch wins, also after a reload."""

    def brightness(visit):
        color = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in re.findall(r"\d+", color)[:3]) / 3

    with visiting(browser, page_server.url, color_scheme="dark") as visit:
        visit.open()
        assert brightness(visit) < 60
        visit.page.click("#theme-switch")
        visit.wait_for(lambda: brightness(visit) > 200, what="the page is light")
        visit.reload()
        visit.wait_for(lambda: brightness(visit) > 200, what="the page is light")


def test_a_phone_shows_everything_within_its_width(browser, page_server):
    """390 pixels: nothing is cut off, and the list of conversations comes when it is called."""
    with visiting(browser, page_server.url, viewport={"width": 390, "height": 800}) as visit:
        visit.page.goto(visit.url)
        visit.page.locator("#bar-start button").wait_for()
        visit.wait_until_begun()
        assert not visit.page.locator("#new-chat").is_visible()
        visit.ask("Hello! What is your name?")
        for part in ("#message", "#send", "#model", "#theme-switch", "#settings", "#chat [data-testid=bot]"):
            box = visit.page.locator(part).first.bounding_box()
            assert box, part
            assert box["x"] >= 0, part
            assert box["x"] + box["width"] <= 391, part
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390
        visit.page.click("#bar-start button")
        visit.page.locator("#new-chat").wait_for()
        visit.page.click("#new-chat")
        visit.wait_for(lambda: visit.questions() == [], what="an empty conversation")


def test_the_page_can_be_used_without_a_mouse(visit):
    """The message box has the focus; Enter sends, Shift+Enter does not, and Tab reaches the buttons."""
    visit.page.locator("#message textarea:focus").wait_for()
    visit.page.keyboard.type("one")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("two")

    def tab_reaches_send():  # a box that is drawn late takes the focus back once
        visit.page.keyboard.press("Tab")
        return visit.page.evaluate("document.activeElement.id") == "send"

    visit.wait_for(tab_reaches_send, what="the focus is on the button")
    with visit.answering():
        visit.page.keyboard.press("Enter")
    visit.page.locator("#message textarea").focus()
    visit.page.keyboard.type("three")
    with visit.answering():
        visit.page.keyboard.press("Control+Enter")
    assert visit.questions() == ["one\ntwo", "three"]


def test_everything_that_can_be_pressed_has_a_name(visit):
    """For those who hear the page."""
    visit.ask("Hello! What is your name?")
    visit.open_settings()
    nameless = visit.page.evaluate(
        """[...document.querySelectorAll('button, input:not([hidden]), textarea, [role=combobox]')]
        .filter(e => e.offsetParent && !(e.innerText || e.ariaLabel || e.title || e.labels?.length || e.placeholder))
        .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
