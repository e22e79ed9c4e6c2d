"""Up, down or flag for the last answer of a chat: kept by the API server beside the votes of the arena.

Which answer a message is travels with the message, in the browser too, so that it can be judged after a reload.
`page.js` shows the buttons where there is an answer to judge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import gradio as gr

from fastchat.errors import FastChatError, RequestError
from fastchat.web.api_client import ApiClient, Judgement, Message
from fastchat.web.failures import Failure, failure_of
from fastchat.web.status_line import HIDDEN, notice
from fastchat.web.translation import label, language_of

JUDGEMENTS: tuple[Judgement, ...] = get_args(Judgement)


class JudgeButtons:
    """The three buttons. `listen` says whose last answer they judge and where a refusal is shown."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def build(self) -> None:
        """Lay them out."""
        with gr.Row(elem_id="judge"):
            self._buttons = {
                vote: gr.Button(label(f"judge_{vote}"), elem_id=f"judge-{vote}", size="sm") for vote in JUDGEMENTS
            }

    def listen(self, pane: Any, status: Any) -> None:  # Any: Gradio's components
        """Connect the buttons."""
        for vote, button in self._buttons.items():
            button.click(self._judging(vote), [pane], [pane, status], **HIDDEN)

    def _judging(self, vote: Judgement) -> Callable[..., Any]:
        async def judge(turns: list[Message], request: gr.Request) -> tuple[Any, Any]:
            mark = turns[-1].mark if turns else None
            if mark is None:
                return gr.skip(), gr.skip()
            body = {"id": mark.answer_id, "model": mark.model, "vote": vote}
            try:
                await self._client.post_json("/api/v1/feedback", body)
            except FastChatError as error:
                language = language_of(request)
                return gr.skip(), notice(_failure(error, mark.model).text(language), language)
            return [*turns[:-1], replace(turns[-1], mark=replace(mark, vote=vote))], gr.skip()

        return judge


def _failure(error: FastChatError, model: str) -> Failure:
    """Another vote than the one that was given, perhaps in another window, has words of its own."""
    was_judged = isinstance(error, RequestError) and error.code == "already_voted"
    return Failure("error_judged") if was_judged else failure_of(error, model)
