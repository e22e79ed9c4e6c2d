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
from fastchat.web.chat_pane import chat_pane, event_index, up_to_question
from fastchat.web.components import AS_IT_IS, PlainDropdown, PlainHTML, PlainTextbox
from fastchat.web.failures import BadInputError, Failure, failure_of
from fastchat.web.questions import RawSettings, chat_request
from fastchat.web.served_models import ServedModels
from fastchat.web.settings_fold import SettingsFold
from fastchat.web.status_line import HIDDEN, notice
from fastchat.web.translation import Language, label, language_of, translate

Kind = Literal["compare", "battle"]
ARENA_KINDS: tuple[Kind, ...] = ("compare", "battle")
VOTES = ("a", "b", "tie", "both_bad")
_BLIND = "(drawn)"
_UNTOLD = "unavailable"
"""The code of a side's failure in a blind round, whose cause would tell the model."""
_OVER = frozenset({"error_voted", "error_round_gone"})
"""What the server says of a round that takes neither turn nor vote; a vote counts even if its answer is lost."""
_READY = '<span class="can-vote"></span>'


class ArenaTab:
    """One of the two tabs."""

    def __init__(
        self, kind: Kind, served: ServedModels, client: ApiClient, answerer: Answerer, *, max_answers: int | None
    ) -> None:
        self._kind = kind
        self._is_blind = kind == "battle"
        self._served = served
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
                self.undo = gr.Button(label("undo"), elem_id=f"{kind}-undo", size="sm")
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
            with gr.Row(elem_classes="side-head"):
                head = PlainHTML(
                    _heading(side),
                    elem_id=f"{self._kind}-name-{side}",
                    elem_classes="side-name",
                    js_on_load=None,
                    apply_default_css=False,
                )
                model = PlainDropdown(
                    choices=[],
                    label=label(f"side_{side}"),
                    show_label=False,
                    container=False,
                    visible=not self._is_blind,
                    elem_id=f"{self._kind}-model-{side}",
                    elem_classes="model-choice",
                )
            pane = chat_pane(
                label=label(f"side_{side}"),
                elem_id=f"{self._kind}-pane-{side}",
                elem_classes="pane",
                height="100%",
                editable="user",
                buttons=["copy"],
            )
        return model, head, pane

    def _listen(self) -> None:
        kind = self._kind
        given = [*self.panes, self.round, *self.models, *self.settings.components]
        shown = [self.box, *self.panes, self.round, self.status, *self.heads]
        begin = f"(...values) => window.fastchat.begin(values, '{kind}')"
        running = {"js": begin, **self._running}
        asked = [
            gr.on([self.box.submit, self.send.click], self.ask, [self.box, *given], shown, **running),
            self.retry.click(self.ask_again, given, shown, **running),
            *(pane.edit(self._asking_edited(side), given, shown, **running) for side, pane in enumerate(self.panes)),
        ]
        for event in asked:
            for ended in (event.then, event.failure):  # as in the chat
                ended(None, js=f"() => window.fastchat.end('{kind}')", **HIDDEN)
        self.stop.click(None, js=f"() => window.fastchat.end('{kind}')", cancels=asked, **HIDDEN)
        for choice, button in self.votes.items():
            button.click(self._voting(choice), [self.round], [self.round, self.status, *self.heads], **HIDDEN)
        self.undo.click(self.take_back, [*self.panes, self.round], shown, **HIDDEN)
        self.new_round.click(self.clear, None, shown, cancels=asked, **HIDDEN)

    async def ask(
        self, text: str, pane_a: list[Message], pane_b: list[Message], the_round: Round, request: gr.Request, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """A message was sent to both."""
        if not isinstance(text, str) or not text.strip():
            yield (gr.skip(),) * 7
            return
        if the_round.is_over:  # it is over: what comes now is another round
            pane_a, pane_b, the_round = [], [], Round()
        sides = [[*pane, Message("user", text)] for pane in (pane_a, pane_b)]
        async with aclosing(self._turn(sides, the_round, rest, language_of(request), is_retry=False)) as updates:
            async for update in updates:
                yield update

    async def ask_again(
        self, pane_a: list[Message], pane_b: list[Message], the_round: Round, request: gr.Request, *rest: Any
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """Both answer the last question once more."""
        sides = [up_to_question(pane) for pane in (pane_a, pane_b)]
        async with aclosing(self._turn_again(sides, the_round, rest, language_of(request))) as updates:
            async for update in updates:
                yield update

    def _asking_edited(self, edited: int) -> Callable[..., Any]:
        async def ask_edited(
            pane_a: list[Message],
            pane_b: list[Message],
            the_round: Round,
            event: gr.EditData,
            request: gr.Request,
            *rest: Any,
        ) -> AsyncGenerator[tuple[Any, ...], None]:
            panes = (pane_a, pane_b)
            number = sum(turn.role == "user" for turn in panes[edited][: event_index(event)])
            question = Message("user", str(event.value))
            sides = [[*_before_question(pane, number), question] for pane in panes]
            async with aclosing(self._turn_again(sides, the_round, rest, language_of(request))) as updates:
                async for update in updates:
                    yield update

        return ask_edited

    def take_back(
        self, pane_a: list[Message], pane_b: list[Message], the_round: Round, request: gr.Request
    ) -> tuple[Any, ...]:
        """The last exchange is taken back from both; its question returns to the message box."""
        sides = [up_to_question(pane) for pane in (pane_a, pane_b)]
        text = sides[0][-1].text if sides[0] else gr.skip()
        the_round, headings = replace(the_round, can_vote=False), self._headings(language_of(request))
        return text, *(turns[:-1] for turns in sides), the_round, "", *headings

    def clear(self, request: gr.Request) -> tuple[Any, ...]:
        """A new round, from nothing."""
        return "", [], [], Round(), "", *self._headings(language_of(request))

    def _headings(self, language: Language, names: Mapping[str, str] | None = None) -> tuple[Any, ...]:
        """What stands over the sides. Named ones are in their selectors all the time."""
        if not self._is_blind:
            return (AS_IT_IS,) * len(SIDES)
        return tuple(_heading(side, language, (names or {}).get(side, "")) for side in SIDES)

    def _voting(self, choice: str) -> Callable[..., Any]:
        async def cast(the_round: Round, request: gr.Request) -> tuple[Any, ...]:
            language = language_of(request)
            try:
                names = await arena_client.vote(self._client, the_round, choice)
            except FastChatError as error:
                failure = failure_of(error, "")
                the_round = replace(the_round, is_over=the_round.is_over or failure.key in _OVER)
                return the_round, notice(failure.text(language), language), gr.skip(), gr.skip()
            thanks = escape(translate(language, "voted", choice=translate(language, f"vote_{choice}")))
            told = f'<p class="told voted" role="status">{thanks}</p>'
            return Round(is_over=True), told, *self._headings(language, names)

        return cast

    def _turn_again(
        self, sides: Sequence[list[Message]], the_round: Round, rest: Sequence[Any], language: Language
    ) -> AsyncGenerator[tuple[Any, ...], None]:
        """The last turn once more; after a vote the same question begins a round of its own."""
        return self._turn(sides, Round() if the_round.is_over else the_round, rest, language, is_retry=True)

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
        box = AS_IT_IS if is_retry else ""  # what is being written meanwhile stays
        yield box, *sides, replace(the_round, can_vote=False), "", *self._headings(language)
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
        now.is_over = any(failure.key in _OVER for failure in failures)
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
            is_last_again = is_retry or not the_round.can_vote  # what was stopped or failed is asked once more
            body |= {"vote_token": the_round.vote_token, "retry": is_last_again}
            return f"/api/v1/arena/rounds/{the_round.round_id}/turns", body
        if not self._is_blind:
            body["models"] = self._checked(models)
        return "/api/v1/arena/rounds", body

    def _checked(self, models: Sequence[Any]) -> list[str]:
        """The chosen models, which are to be two that are served. Raises `BadInputError`."""
        names = [model for model in models if isinstance(model, str) and model]
        if len(names) < len(models):
            raise BadInputError(Failure("error_no_model"))
        if len(set(names)) < len(names):
            raise BadInputError(Failure("error_same_model"))
        for name in names:
            if name in self._served.loading:
                raise BadInputError(Failure("error_loading", {"model": name}))
        return names


def _heading(side: str, language: Language | None = None, name: str = "") -> str:
    """What stands over a side. Before anybody has asked anything, `page.js` writes the word in the page's language."""
    word = escape(translate(language, f"side_{side}")) if language else ""
    return f'<span data-word="side_{side}">{word}</span>' + (f"<strong>{escape(name)}</strong>" if name else "")


def _before_question(turns: Sequence[Message], number: int) -> list[Message]:
    """The turns before the question of that number, counted from 0."""
    questions = [at for at, turn in enumerate(turns) if turn.role == "user"]
    return list(turns[: questions[number]] if number < len(questions) else turns)


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
    cut_off = [translate(language, f"side_{side}") for side in SIDES if answers[side].finish_reason == "length"]
    told = translate(language, "cut_off_sides", sides=translate(language, "and").join(cut_off)) if cut_off else ""
    line = f'<p class="told" role="status">{escape(told)}</p>' if told else ""
    return "".join(notice(text, language) for text in texts) + line + (_READY if now.can_vote else "")


def _reason(error: FastChatError, side: str, language: Language) -> str:
    """Why a side has no answer, without the name of its model."""
    if isinstance(error, UnavailableError) and error.code == _UNTOLD:
        return translate(language, "error_untold")
    return failure_of(error, translate(language, f"side_{side}")).text(language)
