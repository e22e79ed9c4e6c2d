"""One answer on its way to a browser: text is gathered and handed over in updates, larger ones as load grows.

An update costs the page the same whatever it holds, so the time between two grows with what the last one took to be
handed over and with the number of answers that run at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import structlog

from fastchat.errors import FastChatError
from fastchat.web.api_client import AnswerFacts, ApiClient, ChatRequest
from fastchat.web.failures import Failure, failure_of

SHORTEST_S = 0.05
LONGEST_S = 0.3
_PER_ANSWER_S = 0.004
"""About what an update costs, so that all answers together leave half of a core free."""

_log = structlog.stdlib.get_logger(__name__)


class Pace:
    """How long an answer waits before its next update. Shared by all answers of a process."""

    def __init__(self) -> None:
        self.num_answers = 0

    def interval_s(self, last_handover_s: float) -> float:
        """Seconds between two updates, when handing over the last one took `last_handover_s`."""
        wanted = max(SHORTEST_S, self.num_answers * _PER_ANSWER_S, 2 * last_handover_s)
        return min(wanted, LONGEST_S)


class Answer:
    """What has come of one answer, and how it ended."""

    def __init__(self) -> None:
        self.text = ""
        self.failure: Failure | None = None
        self.facts = AnswerFacts(began=time.monotonic())


class Answerer:
    """Asks the API server and paces what comes."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._pace = Pace()

    @property
    def num_answers(self) -> int:
        """Answers that run now."""
        return self._pace.num_answers

    async def answer(self, request: ChatRequest) -> AsyncGenerator[Answer, None]:
        """The answer after each update; the last one is whole, or holds a failure. Closing it ends the answer."""
        answer = Answer()

        async def read(note_news: Callable[[], None]) -> None:
            async with aclosing(self._client.stream(request, answer.facts)) as texts:
                async for text in texts:
                    answer.text += text
                    note_news()

        def fail(failure: Failure) -> None:
            answer.failure = failure

        async with aclosing(self.updates(read, fail, request.model)) as updates:
            async for _ in updates:
                yield answer

    async def updates(
        self, read: Callable[[Callable[[], None]], Awaitable[None]], fail: Callable[[Failure], None], model: str
    ) -> AsyncGenerator[None, None]:
        """Moments for an update while `read` runs, and one at its end. What it raises is given to `fail`."""
        news = asyncio.Event()
        self._pace.num_answers += 1
        reader = asyncio.create_task(self._run(read(news.set), fail, model))
        reader.add_done_callback(lambda _: news.set())
        try:
            while not reader.done():
                await news.wait()
                news.clear()
                if not reader.done():
                    began = time.monotonic()
                    yield
                    interval_s = self._pace.interval_s(time.monotonic() - began)
                    await asyncio.wait({reader}, timeout=interval_s)
            yield
        finally:
            self._pace.num_answers -= 1
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _run(self, reading: Awaitable[None], fail: Callable[[Failure], None], model: str) -> None:
        try:
            await reading
        except FastChatError as error:
            fail(failure_of(error, model))
        except Exception:  # noqa: BLE001 - the top of a task: the person is told, the log has the cause
            _log.exception("an answer failed")
            fail(Failure("error_internal"))
