"""The chat: model, settings, conversation and message box, and what happens when each is used.

The conversation lives in the browser. Each event brings it along, its values are checked again here, and what comes
back is the conversation with one more answer. Lists, storage and small switches are the browser's own (`page.js`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from html import escape
from typing import Any

import gradio as gr

from fastchat.web.answering import Answer, Answerer
from fastchat.web.api_client import AnswerMark, Message
from fastchat.web.chat_pane import chat_pane, event_index, up_to_question
from fastchat.web.components import AS_IT_IS, PlainDropdown, PlainHTML, PlainTextbox
from fastchat.web.failures import BadInputError
from fastchat.web.judging import JudgeButtons
from fastchat.web.questions import RawSettings, chat_request
from fastchat.web.served_models import ServedModels
from fastchat.web.settings_fold import SettingsFold
from fastchat.web.status_line import HIDDEN, notice
from fastchat.web.translation import Language, label, language_of, translate

Update = tuple[Any, Any, Any]
"""Message box, conversation and status line; each a value or a mark for "as it is"."""


class ChatTab:
    """The tab's components and handlers."""

    def __init__(
        self, models: ServedModels, answerer: Answerer, judging: JudgeButtons, *, max_answers: int | None
    ) -> None:
        self._models = models
        self._answerer = answerer
        self._judging = judging
        self._running = {**HIDDEN, "concurrency_limit": max_answers, "concurrency_id": "answers"}

    def build(self) -> None:
        """Lay the tab out; called within its `gr.Tab`."""
        with gr.Row(elem_id="chat-layout", equal_height=True):
            gr.HTML('<div id="conversations"></div>', elem_id="sidebar", js_on_load=None, apply_default_css=False)
            with gr.Column(elem_id="chat-main"):
                with gr.Row(elem_id="chat-bar"):
                    gr.HTML(
                        '<div id="bar-start"></div>', elem_id="bar-start-box", js_on_load=None, apply_default_css=False
                    )
                    self.model = PlainDropdown(
                        choices=[], label=label("model"), show_label=False, container=False, elem_id="model"
                    )
                    gr.HTML('<div id="bar-end"></div>', elem_id="bar-end-box", js_on_load=None, apply_default_css=False)
                self.settings = SettingsFold()
                self.pane = chat_pane(
                    label=label("chat_pane"),
                    elem_id="chat",
                    height="100%",
                    editable="user",
                    buttons=["copy"],
                    placeholder=label("welcome"),
                )
                self._judging.build()
                self.status = PlainHTML("", elem_id="status", js_on_load=None, apply_default_css=False)
                with gr.Row(elem_id="composer"):
                    self.box = PlainTextbox(
                        label=label("message"),
                        placeholder=label("message_placeholder"),
                        show_label=False,
                        container=False,
                        lines=1,
                        max_lines=10,
                        autofocus=True,
                        elem_id="message",
                    )
                    self.send = gr.Button(label("send"), variant="primary", elem_id="send")
                    self.stop = gr.Button(label("stop"), variant="stop", elem_id="stop")
        self._build_switches()

    def _build_switches(self) -> None:
        """Buttons that nobody sees: the browser's own code presses them."""
        with gr.Row(elem_id="switches"):
            self.retry_switch = gr.Button("retry", elem_id="retry-switch")
            self.open_switch = gr.Button("open", elem_id="open-switch")
            self.models_switch = gr.Button("models", elem_id="models-switch")

    def listen(self, blocks: gr.Blocks, followers: Sequence[Any]) -> None:
        """Connect everything; `followers` are other selectors that show what is served."""
        settings: list[Any] = [self.model, *self.settings.components]
        shown = [self.box, self.pane, self.status]
        begin = "(...values) => window.fastchat.begin(values)"
        answers = [
            gr.on(
                [self.box.submit, self.send.click],
                self.ask,
                [self.box, self.pane, *settings],
                shown,
                js=begin,
                **self._running,
            ),
            self.pane.retry(self.answer_again, [self.pane, *settings], shown, js=begin, **self._running),
            self.retry_switch.click(self.try_again, [self.pane, *settings], shown, js=begin, **self._running),
            self.pane.edit(self.answer_edited, [self.pane, *settings], shown, js=begin, **self._running),
        ]
        for answer in answers:
            for ended in (answer.then, answer.failure):  # `then` is not called after a request that failed
                ended(None, js="() => window.fastchat.end()", **HIDDEN)
        self.stop.click(
            None, [self.pane], [self.status], js="(pane) => window.fastchat.stopped(pane)", cancels=answers, **HIDDEN
        )
        self._judging.listen(self.pane, self.status)
        self.pane.undo(self.take_back, [self.pane], shown, **HIDDEN)
        kept = [self.pane, *settings]
        self.pane.change(None, kept, None, js="(...values) => window.fastchat.keep(...values)", **HIDDEN)
        self.open_switch.click(None, None, [*shown, *settings], js="() => window.fastchat.opened()", **HIDDEN)
        selectors = [self.model, *followers]
        self.models_switch.click(
            None, selectors, selectors, js="(...chosen) => window.fastchat.modelUpdate(...chosen)", **HIDDEN
        )
        for part in settings:
            part.change(None, settings, None, js="(...values) => window.fastchat.keepSettings(...values)", **HIDDEN)
        blocks.load(None, None, [*shown, *settings, *followers], js="() => window.fastchat.start()", **HIDDEN)

    async def ask(
        self, text: str, turns: list[Message], request: gr.Request, *settings: Any
    ) -> AsyncGenerator[Update, None]:
        """A message was sent."""
        language = language_of(request)
        if not isinstance(text, str) or not text.strip():
            yield gr.skip(), gr.skip(), gr.skip()
            return
        async with aclosing(self._answer([*turns, Message("user", text)], settings, language)) as updates:
            box: Any = ""
            async for pane, status in updates:
                if pane is None:  # refused before anything was sent: the message stays where it was written
                    yield AS_IT_IS, gr.skip(), status
                else:
                    yield box, pane, status
                    box = AS_IT_IS

    async def answer_again(
        self, turns: list[Message], event: gr.RetryData, request: gr.Request, *settings: Any
    ) -> AsyncGenerator[Update, None]:
        """An answer's retry button was pressed."""
        async for update in self._without_box(up_to_question(turns[: event_index(event) + 1]), settings, request):
            yield update

    async def try_again(
        self, turns: list[Message], request: gr.Request, *settings: Any
    ) -> AsyncGenerator[Update, None]:
        """The last question is asked once more."""
        async for update in self._without_box(up_to_question(turns), settings, request):
            yield update

    async def answer_edited(
        self, turns: list[Message], event: gr.EditData, request: gr.Request, *settings: Any
    ) -> AsyncGenerator[Update, None]:
        """An earlier message was changed: what came after it is answered anew."""
        edited = [*turns[: event_index(event)], Message("user", str(event.value))]
        async for update in self._without_box(edited, settings, request):
            yield update

    def take_back(self, turns: list[Message], event: gr.UndoData) -> Update:
        """The last exchange is taken back; its question returns to the message box."""
        kept = up_to_question(turns[: event_index(event) + 1])
        return (kept[-1].text if kept else ""), kept[:-1], ""

    async def _without_box(
        self, turns: list[Message], settings: Sequence[Any], request: gr.Request
    ) -> AsyncGenerator[Update, None]:
        async with aclosing(self._answer(turns, settings, language_of(request))) as updates:
            async for pane, status in updates:
                yield AS_IT_IS, (gr.skip() if pane is None else pane), status

    async def _answer(
        self, turns: list[Message], settings: Sequence[Any], language: Language
    ) -> AsyncGenerator[tuple[list[Message] | None, Any], None]:
        """The conversation and the status line as the answer grows; None for a conversation that cannot be sent."""
        try:
            request = chat_request(turns, RawSettings(*settings), loading=self._models.loading)
        except BadInputError as error:
            yield None, notice(error.failure.text(language), language, can_retry=False)
            return
        yield turns, ""
        async with aclosing(self._answerer.answer(request)) as answers:
            async for answer in answers:
                yield [*turns, *_shown(answer, request.model)], _status(answer, language)


def _shown(answer: Answer, model: str) -> list[Message]:
    """The answer as a message, once it has a text."""
    if not answer.text:
        return []
    answer_id = answer.facts.answer_id
    return [Message("assistant", answer.text, AnswerMark(answer_id, model) if answer_id else None)]


def _status(answer: Answer, language: Language) -> Any:  # Any: HTML, or the mark for "as it is"
    if answer.failure is not None:
        return notice(answer.failure.text(language), language, can_retry=True)
    facts = answer.facts
    if facts.finish_reason is None:
        return AS_IT_IS
    told = ""
    if facts.finish_reason == "length":
        told = notice(translate(language, "cut_off"), language, can_retry=False)
    elif not answer.text.strip():
        told = notice(translate(language, "empty_answer"), language, can_retry=True)
    generated = facts.num_generated_tokens or 0
    writing_s = facts.total_s - (facts.first_text_s or 0.0)
    line = translate(
        language,
        "speed_line",
        generated=generated,
        prompt=facts.num_prompt_tokens if facts.num_prompt_tokens is not None else "?",
        seconds=f"{facts.total_s:.1f}",
        first=f"{facts.first_text_s or facts.total_s:.2f}",
        speed=f"{(generated - 1) / writing_s:.1f}" if generated > 1 and writing_s > 0 else "–",
    )
    return f'{told}<p class="speed">{escape(line)}</p>'
