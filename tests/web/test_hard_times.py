"""What the page makes of a lost server, a request that fails, a second tab, and a browser that keeps nothing."""

from __future__ import annotations

import json

from tests.web.browser import Visit, visiting
from tests.web.conftest import ENDLESS

HELLO = "Hello! What is your name?"
DENY_STORAGE = """
for (const name of ["localStorage", "sessionStorage"])
  Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
"""
FILL_STORAGE = """() => {
  for (let size = 2 ** 23; size >= 1; size /= 2)
    try { localStorage.setItem(`filler.${size}`, "x".repeat(size)); } catch {}
  localStorage.removeItem("filler.65536");
}"""


def test_a_page_finds_its_server_again(browser, page_server):
    """It says so, in its own language, loads itself anew, and has what was being written."""
    with visiting(browser, page_server.url, locale="zh-CN") as visit:
        visit.open()
        for path in ("**/queue/join*", "**/gradio_api/app_id"):
            visit.page.route(path, lambda route: route.abort())
        visit.page.evaluate("window.isOld = true")
        visit.send(HELLO)
        visit.page.get_by_text("本页的服务器没有响应").wait_for()
        visit.page.unroute_all()
        visit.page.wait_for_function("!window.isOld")
        visit.wait_until_usable()
        assert visit.page.input_value("#message textarea") == HELLO
        with visit.answering():
            visit.page.click("#send")
        assert visit.questions() == [HELLO]
        visit.complaints.clear()


def test_what_was_being_written_outlives_a_reload_in_every_tab(visit):
    """Also one that is loaded once more before it has begun; and it can be sent."""
    visit.page.fill("#message textarea", "one")
    visit.page.get_by_role("tab", name="Battle").click()
    visit.page.fill("#battle-message textarea", "two")
    visit.page.reload(wait_until="domcontentloaded")
    visit.reload()
    assert visit.page.input_value("#message textarea") == "one"
    visit.page.get_by_role("tab", name="Battle").click()
    visit.wait_for(lambda: visit.page.input_value("#battle-message textarea") == "two", what="the other draft")
    visit.page.click("#battle-send")
    visit.page.locator("#battle-pane-a [data-testid=user]", has_text="two").wait_for()
    visit.page.click("#battle-stop")
    visit.page.locator("body:not(.answering-battle)").wait_for()


def test_a_request_that_fails_leaves_the_page_as_it_was(visit):
    """A proxy's own page of errors, say: the message can be sent again."""
    visit.page.route("**/queue/join*", lambda route: route.fulfill(status=502, body="<h1>Bad Gateway</h1>"))
    for kind in ("", "battle-"):
        if kind:
            visit.page.get_by_role("tab", name="Battle").click()
        visit.page.fill(f"#{kind}message textarea", HELLO)
        visit.page.click(f"#{kind}send")
        visit.page.get_by_test_id("toast-body").first.wait_for()
        visit.page.locator(f"#{kind}send").wait_for()
        assert not visit.page.get_by_test_id("status-tracker").locator("visible=true").count()
        assert visit.page.input_value(f"#{kind}message textarea") == HELLO
    visit.page.unroute_all()
    visit.complaints.clear()


def test_nothing_is_sent_while_an_answer_comes(visit, num_running):
    """By no key: two answers would be written into one pane. What was written stays."""
    visit.choose_model(ENDLESS)
    visit.send(HELLO)
    visit.page.locator("#chat [data-testid=bot]").first.wait_for()
    visit.page.click("#stop")
    visit.wait_until_answered()
    visit.page.locator("#chat [aria-label=Edit]").click()
    visit.page.locator("#chat .edit-textarea").fill("Changed.")
    visit.page.locator("#retry-switch").dispatch_event("click")
    visit.page.locator("body.answering").wait_for()
    visit.page.locator("#chat .edit-textarea").press("Control+Enter")
    for keys in ("Enter", "Control+Enter"):
        visit.page.fill("#message textarea", "And now?")
        visit.page.locator("#message textarea").press(keys)
    visit.page.wait_for_timeout(300)
    assert num_running() == 1
    assert visit.page.input_value("#message textarea").strip() == "And now?"
    visit.page.click("#stop")
    visit.wait_until_answered()


def test_a_second_tab_loses_nothing_that_the_first_one_kept(visit):
    """Both show the same conversation, and go on with it."""
    visit.ask(HELLO)
    other = Visit(visit.page.context.new_page(), visit.url).open()
    other.wait_for(lambda: other.questions() == [HELLO], what="the same conversation")
    other.page.fill("#message textarea", "half a message")
    visit.ask("Who made you?")
    other.wait_for(lambda: other.questions() == [HELLO, "Who made you?"], what="what the first tab asked")
    other.wait_for(lambda: other.answers() == visit.answers(), what="the whole answer")
    assert other.page.input_value("#message textarea") == "half a message"
    other.ask("Tell me a joke.")
    visit.wait_for(lambda: len(visit.questions()) == 3, what="what the second tab asked")
    other.page.close()
    visit.reload()
    visit.wait_for(lambda: len(visit.questions()) == len(visit.answers()) == 3, what="all of it")
    assert visit.titles() == [HELLO]
    assert not other.complaints


def test_two_tabs_that_go_on_at_once_keep_both_ways(visit):
    """What one of them writes beside the other becomes a conversation of its own, and neither loses a word."""
    visit.ask(HELLO)
    other = Visit(visit.page.context.new_page(), visit.url).open()
    other.wait_for(lambda: other.questions() == [HELLO], what="the same conversation")
    other.choose_model(ENDLESS)
    other.send("And then?")
    visit.wait_for(lambda: visit.questions() == [HELLO, "And then?"], what="what the other tab asked")
    visit.send("Who made you?")
    visit.wait_for(lambda: visit.titles() == [HELLO, HELLO], what="a second conversation")
    for tab in (visit, other):
        tab.page.bring_to_front()
        tab.page.click("#stop")
        tab.wait_until_answered()
    for tab, question in ((visit, "Who made you?"), (other, "And then?")):
        answer = tab.answers()[-1]
        tab.reload()
        tab.wait_for(lambda tab=tab, answer=answer: tab.answers()[-1:] == [answer], what="the end of the answer")
        assert tab.questions()[-1] == question
        assert tab.titles() == [HELLO, HELLO]
    other.page.close()
    assert not other.complaints


def test_a_browser_that_keeps_nothing_is_told_once(browser, page_server):
    """Everything works for as long as the page is open."""
    with visiting(browser, page_server.url) as visit:
        visit.page.add_init_script(DENY_STORAGE)
        visit.open()
        visit.page.locator(".note", has_text="keeps nothing for this page").wait_for()
        visit.ask(HELLO)
        assert visit.titles() == [HELLO]
        visit.page.click("#theme-switch")
        visit.page.locator("body.dark").wait_for()
        visit.page.click("#new-chat")
        visit.wait_for(lambda: visit.questions() == [], what="an empty conversation")
        visit.page.locator("#conversation-list .conversation").click()
        visit.wait_for(lambda: visit.questions() == [HELLO], what="the conversation")


def test_an_import_that_did_not_fit_says_so(visit, tmp_path):
    """Beside how many there was room for."""
    texts = ("small", "large " * 50_000)
    conversations = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"format": "fastchat-conversations", "version": 1, "conversations": conversations}))
    visit.page.evaluate(FILL_STORAGE)
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#import")
    chooser.value.set_files(path)
    notes = visit.page.locator(".note")
    visit.wait_for(lambda: notes.count() == 2, what="two notes")
    full, imported = (notes.nth(number).bounding_box() for number in range(2))
    assert "storage is full" in notes.nth(0).inner_text()
    assert "imported: 1." in notes.nth(1).inner_text()
    assert full["y"] + full["height"] <= imported["y"]
    assert visit.titles() == ["small"]
