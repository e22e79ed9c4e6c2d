"""Two models side by side, blind battles and the leaderboard, in a real browser on the real system."""

from __future__ import annotations

from fastchat.web.leaderboard_tab import board_html
from tests.web.conftest import DEMO, ENDLESS

HELLO = "Hello! What is your name?"


def ask(visit, kind, text):
    """Send to both and wait for both answers."""
    visit.page.fill(f"#{kind}-message textarea", text)
    visit.page.keyboard.press("Enter")
    visit.page.locator(f"body.answering-{kind}").wait_for()
    visit.page.locator(f"body:not(.answering-{kind})").wait_for(timeout=90_000)
    return [visit.page.locator(f"#{kind}-pane-{side} [data-testid=bot]").all_inner_texts() for side in "ab"]


def limit_tokens(visit, kind, number):
    """Few tokens, so that the model that never ends does."""
    visit.page.locator(f"#{kind}-settings button").first.click()
    visit.page.locator(f"#{kind}-max_tokens :is(textarea, input)").first.fill(str(number))
    visit.page.keyboard.press("Tab")


def test_two_named_models_answer_side_by_side_and_are_voted_on(visit):
    """Both answers stream, a vote counts once, and the next message is a new round."""
    visit.open("/?compare")
    visit.wait_for(lambda: visit.page.input_value("#compare-model-b input") == ENDLESS, what="two models")
    assert visit.page.input_value("#compare-model-a input") == DEMO
    limit_tokens(visit, "compare", 20)
    (first,), (second,) = ask(visit, "compare", HELLO)
    assert first
    assert second
    assert first != second
    assert [len(answers) for answers in ask(visit, "compare", "Who made you?")] == [2, 2]
    visit.page.click("#compare-vote-a")
    visit.page.locator("#compare-main .voted", has_text="A is better").wait_for()
    assert not visit.page.locator("#compare-vote-a").is_visible()
    assert [len(answers) for answers in ask(visit, "compare", HELLO)] == [1, 1]


def test_a_blind_battle_tells_the_names_after_the_vote(visit):
    """Before it neither the page nor what the browser was sent for this round names a side."""
    visit.open("/?arena")
    limit_tokens(visit, "battle", 20)
    ask(visit, "battle", HELLO)
    assert not visit.page.locator("#battle-model-a").is_visible()
    names = [visit.page.locator(f"#battle-name-{side}") for side in "ab"]
    assert [name.inner_text().strip() for name in names] == ["", ""]
    visit.page.click("#battle-retry")
    visit.page.locator("body.answering-battle").wait_for()
    visit.page.locator("body:not(.answering-battle)").wait_for(timeout=90_000)
    visit.page.click("#battle-vote-tie")
    visit.page.locator("#battle-main .voted").wait_for()
    assert sorted(name.inner_text().strip() for name in names) == [DEMO, ENDLESS]
    visit.page.click("#battle-new")
    visit.wait_for(lambda: names[0].inner_text().strip() == "", what="a new round without names")


def test_the_leaderboard_shows_scores_and_intervals(visit):
    """After a vote, both models, with a plot of as many intervals."""
    visit.open("/?arena")
    limit_tokens(visit, "battle", 5)
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
