"""The chat as a person uses it, in a real browser on the real system."""

from __future__ import annotations

import json
import re

import pytest

from tests.processes import run_command
from tests.system import MODEL_NAME
from tests.web.browser import OVER_THE_NETWORK, visiting
from tests.web.conftest import DEMO, ENDLESS

HELLO = "Hello! What is your name?"


def begin_endless_answer(visit):
    """An answer that goes on, seen to have begun."""
    visit.choose_model(ENDLESS)
    visit.send(HELLO)
    visit.page.locator("#chat [data-testid=bot]").first.wait_for()


def test_first_load_shows_the_models_and_gets_an_answer(visit):
    """Without a setting or a reload the page names what is served and answers."""
    assert visit.models() == [DEMO, ENDLESS]
    assert "ChatGLM2-Demo" in visit.ask(HELLO)
    assert visit.questions() == [HELLO]


def test_an_answer_streams_until_stop_ends_it_on_the_worker(visit, num_running):
    """It grows as it comes; at the stop what came stays, and the worker computes nothing more for it."""
    begin_endless_answer(visit)
    assert num_running() == 1
    (early,) = visit.answers()
    visit.wait_for(lambda: len(visit.answers()[0]) > len(early), what="the answer grows")
    visit.page.click("#stop")
    visit.wait_until_answered()
    visit.wait_for(lambda: num_running() == 0, what="the worker's running count is 0")
    (answer,) = visit.answers()
    visit.page.wait_for_timeout(500)
    assert visit.answers() == [answer]
    assert answer.strip()


def test_a_closed_tab_ends_the_answer_on_the_worker(visit, num_running):
    """Nobody is there to read it."""
    begin_endless_answer(visit)
    assert num_running() == 1
    visit.page.close()
    visit.wait_for(lambda: num_running() == 0, what="the worker's running count is 0")


def test_retry_answers_the_same_question_again(visit):
    """One question, one answer, before and after."""
    visit.ask(HELLO)
    with visit.answering():
        visit.page.locator("#chat [aria-label='Answer again']").click()
    assert visit.questions() == [HELLO]
    assert len(visit.answers()) == 1


def test_undo_takes_the_last_exchange_back(visit):
    """Its question returns to the message box."""
    visit.ask(HELLO)
    visit.ask("Who made you?")
    visit.page.locator("#chat [aria-label='Take back']").click()
    visit.wait_for(lambda: visit.questions() == [HELLO], what="one question is left")
    assert visit.page.input_value("#message textarea") == "Who made you?"


def test_an_answer_is_judged_once_and_stays_judged(visit, system):
    """By keyboard, with buttons that say what they do; kept beside the arena's votes, and shown after a reload."""
    visit.ask(HELLO)
    up, down, flag = (visit.page.locator(f"#judge-{vote}") for vote in ("up", "down", "flag"))
    group = visit.page.get_by_role("group", name="Judge this answer")
    group.wait_for()
    assert group.get_by_role("button").all_inner_texts() == ["Good answer", "Bad answer", "Flag"]
    up.focus()
    visit.page.keyboard.press("Tab")
    visit.page.keyboard.press("Enter")
    visit.page.locator(".note", has_text="Your vote on this answer is counted").wait_for()
    visit.reload()
    visit.page.locator("#judge-down[aria-pressed=true]").wait_for()
    assert (up.is_enabled(), down.is_enabled(), flag.is_enabled()) == (False, True, False)
    printed = run_command("main", "votes", state_dir=system.state_dir).stdout.splitlines()
    kept = [line for line in map(json.loads, printed) if line["type"] == "feedback"]
    assert [(line["model"], line["vote"]) for line in kept[-1:]] == [(DEMO, "down")]
    with visit.answering():
        visit.page.locator("#chat [aria-label='Answer again']").click()
    visit.page.locator("#judge-down[aria-pressed=false]").wait_for()
    assert up.is_enabled()


def test_an_edited_message_is_answered_anew(visit):
    """What came after it goes."""
    visit.ask(HELLO)
    visit.ask("Who made you?")
    visit.page.locator("#chat [aria-label='Edit']").first.click()
    visit.page.locator("#chat .edit-textarea").fill("Nothing.")
    visit.page.keyboard.press("Escape")
    visit.wait_for(lambda: visit.questions() == [HELLO, "Who made you?"], what="nothing has changed")
    visit.page.locator("#chat [aria-label='Edit']").first.click()
    visit.page.locator("#chat .edit-textarea").fill("Tell me a joke.")
    with visit.answering():
        visit.page.locator("#chat [aria-label='Send the changed message']").click()
    assert visit.questions() == ["Tell me a joke."]
    assert len(visit.answers()) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", OVER_THE_NETWORK])
def test_copy_buttons_fill_the_clipboard(browser, page_server, host):
    """Of a message as it was written, and of the code in it; also over plain HTTP, where browsers have no clipboard."""
    url = page_server.url.replace("127.0.0.1", host)
    is_local = host == "127.0.0.1"
    permissions = ["clipboard-read", "clipboard-write"] if is_local else []
    with visiting(browser, url, permissions=permissions) as visit:
        visit.open(f"/?model={DEMO}")
        visit.ask("**a**\n\n```python\nx = 1\n```")
        question = visit.page.locator("#chat .user-row").first
        for button, text in (
            (visit.page.locator("#chat [aria-label='Copy message']").first, "**a**\n\n```python\nx = 1\n```"),
            (question.locator(".copy_code_button"), "x = 1"),
        ):
            button.click()
            visit.page.fill("#message textarea", "")
            visit.page.focus("#message textarea")
            visit.page.keyboard.press("Control+V")
            visit.wait_for(lambda text=text: visit.page.input_value("#message textarea") == text, what="it was copied")
            if is_local:
                assert visit.page.evaluate("navigator.clipboard.readText()") == text


def test_clear_empties_the_conversation(visit):
    """And the next message starts from nothing."""
    visit.ask(HELLO)
    visit.page.locator("#chat [aria-label='Clear']").click()
    visit.wait_for(lambda: visit.questions() == [], what="nothing is left")
    visit.ask("Who made you?")
    assert visit.questions() == ["Who made you?"]


def test_reload_keeps_conversation_model_and_settings(visit):
    """The browser remembers; the server need not."""
    visit.choose_model(DEMO)
    answer = visit.ask(HELLO)
    visit.open_settings()
    visit.set_number("max_tokens", 7)
    kept = "JSON.parse(localStorage.getItem('fastchat.settings') ?? '{}').maxTokens == 7"
    visit.wait_for(lambda: visit.page.evaluate(kept), what="the browser has the setting")
    visit.reload()
    visit.wait_for(lambda: visit.answers() == [answer], what="the answer is back")
    assert visit.questions() == [HELLO]
    visit.open_settings()
    assert visit.page.locator("#max_tokens textarea, #max_tokens input").first.input_value() == "7"


def test_settings_reach_the_model(visit):
    """A limit of tokens cuts the answer, and the page says so; the same seed gives the same answer."""
    visit.choose_model(ENDLESS)
    visit.open_settings()
    visit.set_number("max_tokens", 12)
    visit.set_number("seed", 5)
    first = visit.ask(HELLO)
    visit.wait_for_notice("limit of output tokens")
    visit.page.click("#new-chat")
    assert visit.ask(HELLO) == first


def test_a_bad_setting_is_refused_by_name(visit):
    """Nothing is sent, and the message stays in its box."""
    visit.open_settings()
    visit.set_number("seed", "abc")
    visit.send(HELLO)
    visit.wait_for_notice("The seed is a whole number")
    assert visit.page.input_value("#message textarea") == HELLO
    assert visit.questions() == []


def test_speed_and_token_counts_are_shown_on_demand(visit):
    """A line under the answer, only where it is asked for."""
    visit.ask(HELLO)
    speed = visit.page.locator("#status .speed")
    assert not speed.is_visible()
    visit.open_settings()
    visit.page.locator("#show-speed").check()
    speed.wait_for()
    assert re.search(r"\d+ tokens in \d+\.\d s · \d+\.\d tokens/s", speed.inner_text())


def test_a_conversation_beyond_the_context_is_refused_readably(visit):
    """With the model's own numbers, and the question still there."""
    visit.send("word " * 5000)
    notice = visit.wait_for_notice("too long for this model")
    assert "2048" in notice
    visit.wait_until_answered()
    assert len(visit.questions()) == 1


def test_code_tables_and_formulas_are_formatted(visit):
    """Highlighted code, real tables, formulas between dollars and between \\( and \\)."""
    formulas = "$E=mc^2$ and \\(a^2\\) and $面积=πr^2$"
    visit.send(f"```python\ndef f(): return 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n{formulas}")
    user = visit.page.locator("#chat [data-testid=user]").first
    user.locator("pre code .token.keyword").first.wait_for()
    assert user.locator("table td").all_inner_texts() == ["1", "2"]
    visit.wait_for(lambda: user.locator(".katex").count() == 3, what="three formulas")
    visit.wait_until_answered()


def test_dollars_that_are_no_formula_stay_what_they_are(visit, tmp_path):
    """Prices, cells of a table, variables in several blocks of code; and formulas between and behind them."""
    code = "```bash\ncd $HOME\n```\n\nThen:\n\n```bash\nexport PATH=$PATH:/x\n```"
    table = "| a | b |\n|---|---|\n| tea | $5 |\n| cake | $10 |"
    formulas = "so $x_1*y*z_1$, $$\\sum_i x_i$$ and $ a^2 $."
    text = f"It costs $5 or $10, *not* US$7.\n\n{table}\n\n{code}\n\nUse `$1` and `$2`: {formulas}"
    messages = [{"role": role, "content": text} for role in ("user", "assistant")]
    path = tmp_path / "dollars.json"
    conversations = [{"messages": messages}]
    path.write_text(json.dumps({"format": "fastchat-conversations", "version": 1, "conversations": conversations}))
    with visit.page.expect_file_chooser() as chooser:
        visit.page.click("#import")
    chooser.value.set_files(path)
    for side in ("user", "bot"):
        shown = visit.page.locator(f"#chat [data-testid={side}]")
        visit.wait_for(lambda shown=shown: shown.locator(".katex").count() == 3, what="three formulas")
        assert shown.locator(".katex-display").count() == 1
        assert shown.locator("td").all_inner_texts() == ["tea", "$5", "cake", "$10"]
        assert [each.strip() for each in shown.locator("pre code").all_inner_texts()] == [
            "cd $HOME",
            "export PATH=$PATH:/x",
        ]
        assert shown.locator("p code").all_inner_texts() == ["$1", "$2"]
        assert shown.locator("em").all_inner_texts() == ["not"]
        assert "It costs $5 or $10, not US$7." in shown.inner_text()


def test_url_names_the_model(visit):
    """FastChat's `?model=`."""
    visit.open(f"/?model={ENDLESS}")
    visit.wait_for(lambda: visit.page.input_value("#model input") == ENDLESS, what="the model is chosen")
    assert MODEL_NAME not in visit.models()
