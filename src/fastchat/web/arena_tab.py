"""Two models side by side: named ones to compare, or drawn ones in a blind battle whose vote reveals them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from html import escape
from typing import Any, Literal

import gradio as gr

from fastchat.api.answer_reader import error_of
from fastchat.errors import FastChatError, UnavailableError
from fastchat.web import arena_client
from fastchat.web.answering import Answerer
from fastchat.web.api_client import ApiClient, Message
from fastchat.web.arena_client import SIDES, Round, Side
from fastchat.web.chat_pane import chat_pane
from fastchat.web.components import AS_IT_IS, PlainDropdown, PlainHTML, PlainTextbox
from fastchat.web.failures import BadInputError, Failure, failure_of
from fastchat.web.questions import RawSettings, chat_request
from fastchat.web.settings_fold import SettingsFold
from fastchat.web.status_line import HIDDEN, notice
from fastchat.web.translation import Language, label, language_of, translate

Kind = Literal["compare", "battle"]
ARENA_KINDS: tuple[Kind, ...] = ("compare", "battle")
VOTES = ("a", "b", "tie", "both_bad")
_BLIND = "(drawn)"
_READY = '<span class="can-vote"></span>'


class ArenaTab:
    """One of the two tabs."""

    def __init__(self, kind: Kind, client: ApiClient, answerer: Answerer, *, max_answers: int | None) -> None:
        self._kind = kind
        self._is_blind = kind == "battle"
        self._client = client
        self._answerer = answerer
        self._running = {**HIDDEN, "concurrency_limit": max_answers, "concurrency_id": "answers"}

    def build(self) -> None:
        """Lay the tab out and listen to it; called within its `gr.Tab`."""
        kind = self._kind
        with gr.Column(elem_id=f"{kind}-main", elem_classes="arena"):
            with gr.Row(elem_classes="sides"):
                self.models, self.heads, self.panes = zip(*(self._side(side) for side in SIDES), strict=True)
            self.status = PlainHTML(
                "", elem_id=f"{kind}-status", elem_classes="status", js_on_load=None, apply_default_css=False
            )
            with gr.Row(elem_classes="votes"):
                self.votes = {
                    vote: gr.Button(label(f"vote_{vote}"), elem_id=f"{kind}-vote-{vote}", size="sm") for vote in VOTES
                }
            with gr.Row(elem_classes="votes-after"):
                self.retry = gr.Button(label("retry"), elem_id=f"{kind}-retry", size="sm")
                self.new_round = gr.Button(label("new_round"), elem_id=f"{kind}-new", size="sm")
            with gr.Row(elem_classes="composer"):
                self.box = PlainTextbox(
                    label=label("message"),
                    placeholder=label("battle_placeholder" if self._is_blind else "message_placeholder"),
                    show_label=False,
                    container=False,
                    lines=1,
                    max_lines=10,
                    elem_id=f"{kind}-message",
                    elem_classes="message-box",
                )
                self.send = gr.Button(label("send"), variant="primary", elem_id=f"{kind}-send", elem_classes="send")
                self.stop = gr.Button(label("stop"), variant="stop", elem_id=f"{kind}-stop", elem_classes="stop")
            self.settings = SettingsFold(prefix=f"{kind}-")
        self.round = gr.State(Round())
        self._listen()

    def _side(self, side: str) -> tuple[Any, Any, Any]:
        with gr.Column(min_width=280):
            name = f"{self._kind}-model-{side}"
            model = PlainDropdown(
                choices=[],
                label=label(f"side_{side}"),
                show_label=False,
                container=False,
                visible=not self._is_blind,
                elem_id=name,
                elem_classes="model-choice",
            )
            head = PlainHTML(
                "",
                elem_id=f"{self._kind}-name-{side}",
                elem_classes="side-name",
                visible=self._is_blind,
                js_on_load=None,
                apply_default_css=False,
            )
            pane = chat_pane(
                label=label(f"side_{side}"),
                elem_id=f"{self._kind}-pane-{side}",
                elem_classes="pane",
                height="100%",
                buttons=["copy"],
            )
        return model, head, pane

    def _listen(self) -> None:
        kind = self._kind
        given = [*self.panes, self.round, *self.models, *self.settings.components]
        shown = [self.box, *self.panes, self.round, self.status, *self.heads]
        begin = f"(...values) => window.fastchat.begin(values, '{kind}')"
        asked = [
            gr.on([self.box.submit, self.send.click], self.ask, [self.box, *given], shown, js=begin, **self._running),
            self.retry.click(self.ask_again, given, shown, js=begin, **self._running),
        ]
        for event in asked:
            event.then(None, js=f"() => window.fastchat.end('{kind}')", **HIDDEN)
        self.stop.click(None, js=f"() => window.fastchat.end('{kind}')", cancels=asked, **HIDDEN)
        for choice, button in self.votes.items():
            button.click(self._voting(choice), [self.round], [self.round, self.status, *self.heads], **HIDDEN)
        self.new_round.click(self.clear, None, shown, cancels=asked, **HIDDEN)

    async def ask(
        self, text: str, pane_a: list[Message], pane_b: list[Message], the_round: Round, request: gr.Request, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """A message was sent to both."""
        if not isinstance(text, str) or not text.strip():
            yield (gr.skip(),) * 7
            return
        if the_round.has_voted:  # the names are known: what comes now is another round
            pane_a, pane_b, the_round = [], [], Round()
        sides = [[*pane, Message("user", text)] for pane in (pane_a, pane_b)]
        async with aclosing(self._turn(sides, the_round, rest, language_of(request), is_retry=False)) as updates:
            async for update in updates:
                yield update

    async def ask_again(
        self, pane_a: list[Message], pane_b: list[Message], the_round: Round, request: gr.Request, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Both answer the last question once more."""
        if the_round.has_voted:  # the same question, in a round of its own
            the_round = Round()
        sides = [pane[:-1] if pane and pane[-1].role == "assistant" else pane for pane in (pane_a, pane_b)]
        async with aclosing(self._turn(sides, the_round, rest, language_of(request), is_retry=True)) as updates:
            async for update in updates:
                yield update

    def clear(self) -> tuple[Any, ...]:
        """A new round, from nothing."""
        return "", [], [], Round(), "", "", ""

    def _voting(self, choice: str) -> Callable[..., Any]:
        async def cast(the_round: Round, request: gr.Request) -> tuple[Any, ...]:
            language = language_of(request)
            try:
                names = await arena_client.vote(self._client, the_round, choice)
            except FastChatError as error:
                text = failure_of(error, "").text(language)
                return the_round, notice(text, language), gr.skip(), gr.skip()
            heads = (f"<strong>{escape(names.get(side, ''))}</strong>" for side in SIDES)
            thanks = escape(translate(language, "voted", choice=translate(language, f"vote_{choice}")))
            return Round(has_voted=True), f'<p class="voted" role="status">{thanks}</p>', *heads

        return cast

    async def _turn(
        self,
        sides: Sequence[list[Message]],
        the_round: Round,
        rest: Sequence[Any],
        language: Language,
        *,
        is_retry: bool,
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """One turn of both sides as it grows. `rest` is the two models and the settings."""
        models = () if self._is_blind else tuple(rest[: len(SIDES)])
        if models != the_round.models:  # others were chosen, or one is gone: another round
            the_round = Round(models)
        try:
            path, body = self._request(sides, the_round, rest, is_retry=is_retry)
        except BadInputError as error:
            yield *(gr.skip(),) * 4, notice(error.failure.text(language), language), gr.skip(), gr.skip()
            return
        yield "", *sides, replace(the_round, can_vote=False), "", "", ""
        answers = {side: Side() for side in SIDES}
        now = replace(the_round, can_vote=False)
        failures: list[Failure] = []

        async def read(note_news: Callable[[], None]) -> None:
            async with aclosing(arena_client.read_turn(self._client, path, body)) as events:
                async for event in events:
                    _take(event, answers, now)
                    note_news()

        async with aclosing(self._answerer.updates(read, failures.append, "")) as updates:
            async for _ in updates:
                yield AS_IT_IS, *_panes(sides, answers), now, *(AS_IT_IS,) * 3
        status = _outcome(answers, now, failures, language)
        yield AS_IT_IS, *_panes(sides, answers), now, status, AS_IT_IS, AS_IT_IS

    def _request(
        self, sides: Sequence[list[Message]], the_round: Round, rest: Sequence[Any], *, is_retry: bool
    ) -> tuple[str, dict[str, Any]]:
        """Where the turn is asked for, and its body. Raises `BadInputError`."""
        models, settings = rest[:2], rest[2:]
        checked = [chat_request(turns, RawSettings(_BLIND, *settings)) for turns in sides]
        options = {name: getattr(checked[0], name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        system = settings[0] if isinstance(settings[0], str) else ""
        body = arena_client.turn_body(dict(zip(SIDES, sides, strict=True)), options, system=system)
        if the_round.round_id:
            body |= {"vote_token": the_round.vote_token, "retry": is_retry}
            return f"/api/v1/arena/rounds/{the_round.round_id}/turns", body
        if not self._is_blind:
            if not all(isinstance(model, str) and model for model in models):
                raise BadInputError(Failure("error_no_model"))
            body["models"] = list(models)
        return "/api/v1/arena/rounds", body


def _take(event: Mapping[str, Any], answers: Mapping[str, Side], now: Round) -> None:
    """Put one event where it belongs."""
    side = answers.get(str(event.get("side")))
    match event.get("type"):
        case "round":
            now.round_id = str(event["round_id"])
            now.vote_token = str(event.get("vote_token") or now.vote_token)
        case "chunk" if side is not None:
            choice = (event["chunk"].get("choices") or [{}])[0]
            side.text += choice.get("delta", {}).get("content") or ""
        case "done" if side is not None:
            side.finish_reason = str(event.get("finish_reason"))
        case "error" if side is not None:
            side.error = error_of(event) or UnavailableError("The answer failed.")
        case "end":
            now.can_vote = bool(event.get("can_vote"))


def _panes(sides: Sequence[list[Message]], answers: Mapping[str, Side]) -> list[list[Message]]:
    texts = [answers[side].text for side in SIDES]
    return [[*turns, Message("assistant", text)] if text else turns for turns, text in zip(sides, texts, strict=True)]


def _outcome(answers: Mapping[str, Side], now: Round, failures: Sequence[Failure], language: Language) -> str:
    texts = [failure.text(language) for failure in failures]
    texts += [
        translate(language, "error_side", side=side.upper(), detail=_reason(answer.error, side, language))
        for side, answer in answers.items()
        if answer.error is not None
    ]
    return "".join(notice(text, language) for text in texts) + (_READY if now.can_vote else "")


def _reason(error: FastChatError, side: str, language: Language) -> str:
    """Why a side has no answer, without the name of its model."""
    return failure_of(error, translate(language, f"side_{side}")).text(language)
