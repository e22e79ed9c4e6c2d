"""A real Chromium on the page. Whatever it complains of, and whatever it asks of another origin, fails the test."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, Response

OVER_THE_NETWORK = "page.test"
"""A name of this machine that a browser takes for another one: what it keeps from plain HTTP is kept from the page."""
FLAGS = (
    f"--host-resolver-rules=MAP {OVER_THE_NETWORK} 127.0.0.1",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ABOUT_A_FORMULA = ("LaTeX-incompatible input", "No character metrics")
"""KaTeX's remarks on a formula that it shows all the same: a model may write any text between two dollar signs."""
AS_IT_LEAVES = "AbortError"
"""Of Gradio, when a page that is left ends its own stream of events: thrown, or written to the console."""
WIDE = {"width": 1280, "height": 800}
LIMIT_MS = 60_000


COUNT_ANSWERS = """
window.numAnswered = 0;
document.addEventListener("DOMContentLoaded", () => new MutationObserver((changes) => {
  const classes = [...changes.map((change) => change.oldValue ?? ""), document.body.className];
  classes.forEach((now, at) => {
    if (at > 0 && /answering/.test(classes[at - 1]) && !/answering/.test(now)) window.numAnswered += 1;
  });
}).observe(document.body, { attributes: true, attributeFilter: ["class"], attributeOldValue: true }));
"""
"""An answer may begin and end between two looks at the page."""


class Visit:
    """One browser window, with an empty storage, on the page."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.url = url
        self.complaints: list[str] = []
        page.set_default_timeout(LIMIT_MS)
        page.add_init_script(COUNT_ANSWERS)
        page.on("console", self._note_console)
        page.on("pageerror", self._note_error)
        page.on("request", self._note_request)
        page.on("response", self._note_response)

    def open(self, path: str = "/") -> Visit:
        """Load the page and wait until it can be used."""
        self.page.goto(self.url + path)
        return self.wait_until_usable()

    def reload(self) -> Visit:
        self.page.reload()
        return self.wait_until_usable()

    def wait_until_usable(self) -> Visit:
        self.page.locator("#theme-switch").wait_for()
        self.wait_until_begun()
        self.page.locator(":is(#message, .message-box) textarea:visible, #leaderboard").first.wait_for()
        return self

    def wait_until_begun(self) -> None:
        """Wait until the page has chosen a model: until then it may still empty the message box, or ask nobody."""
        self.page.wait_for_function("document.querySelector('#model input')?.value")

    def forget(self) -> None:
        """Leave the page, and take away all that it kept: from a file of its origin, where its own code is gone."""
        self.page.goto(f"{self.url}/page/icon.svg")
        self.page.evaluate("localStorage.clear(); sessionStorage.clear()")
        self.page.context.clear_cookies()
        self.complaints.clear()

    def send(self, text: str) -> None:
        self.page.fill("#message textarea", text)
        self.page.keyboard.press("Enter")

    def ask(self, text: str) -> str:
        """Send a message, wait for the whole answer, return it."""
        with self.answering():
            self.send(text)
        return self.answers()[-1]

    @contextmanager
    def answering(self) -> Iterator[None]:
        """What is done in the block begins an answer, or a pair; at its end that has been given."""
        num_before = self.page.evaluate("window.numAnswered")
        yield
        self.page.wait_for_function("number => window.numAnswered > number", arg=num_before, timeout=90_000)

    def wait_until_answered(self) -> None:
        self.page.locator("body:not(.answering)").wait_for(timeout=60_000)

    def answers(self) -> list[str]:
        return self.page.locator("#chat [data-testid=bot]").all_inner_texts()

    def questions(self) -> list[str]:
        return self.page.locator("#chat [data-testid=user]").all_inner_texts()

    def titles(self) -> list[str]:
        return self.page.locator("#conversation-list .conversation").all_inner_texts()

    def choose_model(self, name: str, selector: str = "model") -> None:
        self.page.locator(f"#{selector} input").click()
        self.page.get_by_role("option", name=re.compile(name)).click()

    def models(self) -> list[str]:
        self.page.locator("#model input").click()
        names = self.page.get_by_role("option").all_inner_texts()
        self.page.keyboard.press("Escape")
        self.page.locator("#model input").blur()  # it opens when it gets the focus
        return [name.removeprefix("✓").strip() for name in names]

    def open_settings(self) -> None:
        self.page.locator("#settings button").first.click()
        self.page.locator("#temperature").wait_for()

    def limit_tokens(self, kind: str, number: int) -> None:
        """Few tokens for both sides, so that the model that never ends does."""
        self.page.locator(f"#{kind}-settings button").first.click()
        self.page.locator(f"#{kind}-max_tokens :is(textarea, input)").first.fill(str(number))
        self.page.keyboard.press("Tab")

    def set_number(self, name: str, value: float | str) -> None:
        self.page.locator(f"#{name} input[type=number], #{name} textarea, #{name} input").first.fill(str(value))
        self.page.keyboard.press("Tab")

    def wait_for_notice(self, text: str | re.Pattern[str]) -> str:
        notice = self.page.locator("#status .notice").filter(has_text=text)
        notice.wait_for()
        return notice.inner_text()

    def wait_for(self, condition: Callable[[], bool], *, what: str, limit_s: float = 60.0) -> None:
        """Wait until something holds that the page does not announce."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, f"{what}: not within {limit_s} s"
            if self.page.is_closed():
                time.sleep(0.05)
            else:  # Playwright's events come while it waits
                self.page.wait_for_timeout(50)

    def _note_error(self, error: Exception) -> None:
        if AS_IT_LEAVES not in str(error):
            self.complaints.append(f"error: {error}")

    def _note_console(self, message: ConsoleMessage) -> None:
        is_remark = message.text.startswith((*ABOUT_A_FORMULA, AS_IT_LEAVES))
        if message.type in {"error", "warning"} and not is_remark:
            self.complaints.append(f"{message.type}: {message.text}")

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:", "blob:", "about:")):
            self.complaints.append(f"request to {request.url}")

    def _note_response(self, response: Response) -> None:
        if response.status >= 400:
            self.complaints.append(f"{response.status} of {response.url}")


@contextmanager
def visiting(browser: Browser, url: str, **options: object) -> Iterator[Visit]:
    """A window of its own; at its end nothing may have been complained of."""
    context = browser.new_context(**{"viewport": WIDE, "locale": "en-US", **options})
    visit = Visit(context.new_page(), url)
    try:
        yield visit
    finally:
        context.close()
    assert not visit.complaints, visit.complaints


class SharedWindow:
    """A window that many tests use in turn, each with an empty storage: it has the page's scripts compiled already."""

    def __init__(self, browser: Browser, url: str) -> None:
        self._browser = browser
        self._url = url
        self._visit: Visit | None = None

    @contextmanager
    def visiting(self) -> Iterator[Visit]:
        """The next visitor; at its end nothing may have been complained of."""
        visit = self._visit
        if visit is None or visit.page.is_closed():
            self.close()
            context = self._browser.new_context(viewport=WIDE, locale="en-US")
            visit = self._visit = Visit(context.new_page(), self._url)
        else:
            visit.forget()
        yield visit.open()
        assert not visit.complaints, visit.complaints

    def close(self) -> None:
        if self._visit is not None:
            self._visit.page.context.close()
