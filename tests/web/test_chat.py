"""The chat as a person uses it, in a real browser on the real system."""

from __future__ import annotations

from tests.web.conftest import DEMO, ENDLESS


def test_first_load_shows_the_models_and_streams_an_answer(visit):
    """Without a setting or a reload the page names what is served and answers, growing as it comes."""
    assert visit.models() == [DEMO, ENDLESS]
    visit.send("Hello! What is your name?")
    first = visit.page.locator("#chat [data-testid=bot]").first
    first.wait_for()
    early = first.inner_text()
    visit.wait_until_answered()
    (answer,) = visit.answers()
    assert answer.startswith(early.strip()[:10])
    assert len(answer) > len(early)
    assert "ChatGLM2-Demo" in answer
    assert visit.questions() == ["Hello! What is your name?"]
