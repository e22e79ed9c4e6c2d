"""Two models side by side, blind battles and the leaderboard, in a real browser on the real system."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastchat.errors import RequestError
from fastchat.web.answering import Answerer
from fastchat.web.api_client import Message
from fastchat.web.arena_client import Round
from fastchat.web.arena_tab import ArenaTab
from fastchat.web.leaderboard_tab import board_html
from tests.web.browser import visiting
from tests.web.conftest import DEMO, ENDLESS

HELLO = "Hello! What is your name?"


def open_tab(visit, kind):
    """By the address, as FastChat had it."""
    if kind == "battle":
        visit.open("/?arena")
    else:
        visit.open("/?compare")
        visit.wait_for(lambda: visit.page.input_value("#compare-model-b input") == ENDLESS, what="two models")


def ask(visit, kind, text):
    """Send to both and wait for both answers."""
    visit.page.fill(f"#{kind}-message textarea", text)
    with visit.answering():
        visit.page.keyboard.press("Enter")
    return [visit.page.locator(f"#{kind}-pane-{side} [data-testid=bot]").all_inner_texts() for side in "ab"]


def test_two_named_models_answer_side_by_side_and_are_voted_on(visit):
    """Both answers stream, a vote counts once, and the next message is a new round."""
    open_tab(visit, "compare")
    assert visit.page.input_value("#compare-model-a input") == DEMO
    visit.limit_tokens("compare", 20)
    (first,), (second,) = ask(visit, "compare", HELLO)
    assert first
    assert second
    assert first != second
    assert [len(answers) for answers in ask(visit, "compare", "Who made you?")] == [2, 2]
    visit.page.click("#compare-vote-a")
    visit.page.locator("#compare-main .voted", has_text="A is better").wait_for()
    assert not visit.page.locator("#compare-vote-a").is_visible()
    assert [len(answers) for answers in ask(visit, "compare", HELLO)] == [1, 1]


@pytest.mark.parametrize("kind", ["compare", "battle"])
def test_stop_ends_both_answers_on_the_worker(visit, num_running, kind):
    """What came stays, nobody can vote on half an answer, and asking again completes the round."""
    open_tab(visit, kind)
    visit.page.fill(f"#{kind}-message textarea", HELLO)
    visit.page.keyboard.press("Enter")
    answers = visit.page.locator(f"#{kind}-main [data-testid=bot]")
    visit.wait_for(lambda: answers.count() == 2, what="both have begun")
    visit.page.click(f"#{kind}-stop")
    visit.page.locator(f"body:not(.answering-{kind})").wait_for()
    visit.wait_for(lambda: num_running() == 0, what="the worker's running count is 0")
    assert all(text.strip() for text in answers.all_inner_texts())
    assert not visit.page.locator(f"#{kind}-vote-a").is_visible()
    visit.limit_tokens(kind, 5)
    if kind == "compare":
        visit.page.click("#compare-retry")
    else:  # another question goes on as well
        visit.page.fill("#battle-message textarea", "Who made you?")
        visit.page.keyboard.press("Enter")
    visit.page.locator(f"#{kind}-vote-a").wait_for()
    assert answers.count() == (2 if kind == "compare" else 4)


def test_a_phone_shows_both_sides_and_the_leaderboard(browser, page_server):
    """390 pixels: answers, votes, message box and table within the width, and the votes within reach."""
    with visiting(browser, page_server.url, viewport={"width": 390, "height": 800}) as visit:
        for kind in ("compare", "battle"):
            open_tab(visit, kind)
            visit.limit_tokens(kind, 5)
            visit.page.locator(f"#{kind}-settings button").first.click()
            ask(visit, kind, HELLO)
            parts = [f"#{kind}-pane-a", f"#{kind}-pane-b", f"#{kind}-message", f"#{kind}-send"]
            for part in [*parts, *(f"#{kind}-vote-{vote}" for vote in ("a", "b", "tie", "both_bad"))]:
                assert_within(visit, part, width=390, height=800)
            for side in "ab":
                assert visit.page.locator(f"#{kind}-pane-{side} [data-testid=bot]").bounding_box()["height"] > 0
                assert visit.page.locator(f"#{kind}-pane-{side}").bounding_box()["height"] > 120
            visit.page.click(f"#{kind}-vote-tie")
            visit.page.locator(f"#{kind}-main .voted").wait_for()
        visit.open("/?leaderboard")
        visit.page.locator("#leaderboard table").wait_for()
        assert_within(visit, "#leaderboard-main", width=390, height=10_000)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 390


def assert_within(visit, part, *, width, height):
    box = visit.page.locator(part).first.bounding_box()
    assert box, part
    assert box["x"] >= 0, (part, box)
    assert box["x"] + box["width"] <= width + 1, (part, box)
    assert box["y"] >= 0, (part, box)
    assert box["y"] + box["height"] <= height + 1, (part, box)


def test_a_blind_battle_tells_the_names_after_the_vote(visit):
    """Before it neither the page nor what the browser was sent for this round names a side."""
    visit.open("/?arena")
    visit.limit_tokens("battle", 20)
    ask(visit, "battle", HELLO)
    assert not visit.page.locator("#battle-model-a").is_visible()
    names = [visit.page.locator(f"#battle-name-{side}") for side in "ab"]
    assert [name.inner_text().strip() for name in names] == ["Model A", "Model B"]
    with visit.answering():
        visit.page.click("#battle-retry")
    visit.page.click("#battle-vote-tie")
    visit.page.locator("#battle-main .voted").wait_for()
    assert sorted(name.locator("strong").inner_text() for name in names) == [DEMO, ENDLESS]
    visit.page.click("#battle-new")
    visit.wait_for(lambda: names[0].inner_text().strip() == "Model A", what="a new round without names")


def test_a_pair_s_messages_can_be_edited_and_taken_back(visit):
    """From both sides at once, whichever was touched; what is asked in their place completes the same round."""
    open_tab(visit, "compare")
    visit.limit_tokens("compare", 5)
    assert not visit.page.locator("#compare-undo").is_visible()
    ask(visit, "compare", HELLO)
    ask(visit, "compare", "Who made you?")
    questions = visit.page.locator("#compare-main [data-testid=user]")
    visit.page.locator("#compare-pane-b [aria-label='Edit']").last.click()
    visit.page.locator("#compare-pane-b .edit-textarea").fill("Tell me a joke.")
    with visit.answering():
        visit.page.keyboard.press("Control+Enter")
    assert questions.all_inner_texts() == [HELLO, "Tell me a joke."] * 2
    visit.page.locator("#compare-vote-a").wait_for()
    visit.page.click("#compare-undo")
    visit.wait_for(lambda: questions.all_inner_texts() == [HELLO] * 2, what="one question is left on each side")
    assert visit.page.input_value("#compare-message textarea") == "Tell me a joke."
    assert not visit.page.locator("#compare-vote-a").is_visible()
    with visit.answering():
        visit.page.click("#compare-send")
    visit.page.locator("#compare-vote-a").wait_for()


def test_a_model_is_not_compared_with_itself(visit):
    """In words of the page, before anything is sent."""
    open_tab(visit, "compare")
    visit.choose_model(DEMO, "compare-model-b")
    visit.page.fill("#compare-message textarea", HELLO)
    visit.page.keyboard.press("Enter")
    visit.page.locator("#compare-status .notice", has_text="two different models").wait_for()
    assert visit.page.input_value("#compare-message textarea") == HELLO


class RefusingClient:
    """Of an API server that knows nothing of a round, or of one that is over."""

    def __init__(self, code):
        self.paths = []
        self._code = code

    async def stream_bytes(self, path, body):
        self.paths.append(path)
        raise RequestError("It is over.", code=self._code)
        yield

    async def post_json(self, path, body):
        raise RequestError("It is over.", code=self._code)


@pytest.mark.parametrize("code", ["already_voted", "round_not_found"])
def test_after_a_round_that_is_over_comes_another(code):
    """A vote counts even if its answer is lost; nobody has to find out why no message gets through any more."""
    client = RefusingClient(code)
    tab = ArenaTab("battle", None, client, Answerer(client), max_answers=None)

    async def ask(the_round):
        updates = tab.ask(HELLO, [Message("user", "Hi")], [], the_round, None, None, None, "", 0.7, 1.0, None, None)
        return [update async for update in updates][-1]

    async def vote_and_ask():
        begun = Round(round_id="round-1", vote_token="t", can_vote=True)
        voted, told, *_ = await tab._voting("a")(begun, None)
        _, _, _, after, notice, *_ = await ask(begun)
        assert (voted.is_over, after.is_over, notice) == (True, True, told)
        return (await ask(after))[1]

    with ThreadPoolExecutor(1) as pool:  # the browser's own loop runs in this thread
        pane = pool.submit(asyncio.run, vote_and_ask()).result()
    assert client.paths == ["/api/v1/arena/rounds/round-1/turns", "/api/v1/arena/rounds"]
    assert pane == [Message("user", HELLO)]


def test_the_leaderboard_shows_scores_and_intervals(visit):
    """After a vote, both models, with a plot of as many intervals."""
    visit.open("/?arena")
    visit.limit_tokens("battle", 5)
    ask(visit, "battle", HELLO)
    visit.page.click("#battle-vote-both_bad")
    visit.page.locator("#battle-main .voted").wait_for()
    visit.page.get_by_role("tab", name="Leaderboard").click()
    table = visit.page.locator("#leaderboard table")
    table.wait_for()
    assert sorted(table.locator("td:nth-child(2)").all_inner_texts()) == [DEMO, ENDLESS]
    assert visit.page.locator("#leaderboard svg circle").count() == 2


def test_what_a_board_names_is_text():
    """A model may be called anything."""
    row = {
        "model": "<img src=x onerror=1>",
        "rank": 1,
        "score": 1000.0,
        "interval": [900.0, 1100.0],
        "num_votes": 2,
        "wins": 1,
        "losses": 1,
        "ties": 0,
        "both_bad": 0,
    }
    assert "<img" not in board_html({"models": [row], "num_votes": 2}, "en")
    assert "Nobody has voted" in board_html({"models": [], "num_votes": 0}, "en")
