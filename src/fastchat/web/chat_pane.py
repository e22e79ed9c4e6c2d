"""A chat pane that holds text and nothing else: no file, no component, no address that anything would fetch.

Gradio's own pane builds components and moves files that a client names in a message. Here a message that is not plain
text is refused before anything looks at it, and text passes both ways unchanged (Gradio's would re-indent it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import gradio as gr
from gradio.data_classes import GradioModel, GradioRootModel
from pydantic import ConfigDict

from fastchat.web.api_client import AnswerMark, Judgement, Message
from fastchat.web.components import variant_of

LATEX_DELIMITERS: list[dict[str, str | bool]] = [
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
"""In this order; `text.js` makes them of the dollars around what is a formula."""
SHOWN_AS_TEXT = (
    *("area", "article", "aside", "audio", "base", "body", "canvas", "dialog", "embed", "fieldset", "font", "footer"),
    *("form", "frame", "frameset", "head", "header", "html", "iframe", "image", "img", "input", "label", "link"),
    *("main", "map", "marquee", "math", "meta", "nav", "noembed", "noframes", "noscript", "object", "option"),
    *("picture", "plaintext", "portal", "script", "section", "select", "slot", "source", "style", "template"),
    *("textarea", "title", "track", "use", "video", "xmp", "feimage", "animate", "set", "foreignobject"),
)
"""Tags in model or user text that are written out instead of obeyed: all that fetch, submit, play or restyle."""


class TextPart(GradioModel):
    """One part of a message as the browser sends it."""

    model_config = ConfigDict(extra="ignore")

    text: str
    type: Literal["text"]


class PaneMark(GradioModel):
    """What a message carries beside its text, in the place that Gradio has for titles of folded messages."""

    model_config = ConfigDict(extra="ignore")

    title: None = None
    answer_id: str | None = None
    model: str | None = None
    vote: Judgement | None = None


class PaneMessage(GradioModel):
    """One message as the browser sends it."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "user", "assistant"]
    content: list[TextPart] | str
    metadata: PaneMark | None = None


class PaneMessages(GradioRootModel):
    """The whole pane."""

    root: list[PaneMessage]


def _preprocess(_self: Any, payload: Any) -> list[Message]:
    """What the browser sent, as messages."""
    if not isinstance(payload, PaneMessages):
        return []
    return [Message(message.role, _text_of(message), _mark_of(message)) for message in payload.root]


def _postprocess(_self: Any, value: Any) -> PaneMessages:
    """Messages as the browser shows them."""
    shown: Sequence[Message] = value or ()
    return PaneMessages.model_construct(root=[_shown(message) for message in shown])


ChatPane = variant_of(gr.Chatbot, data_model=PaneMessages, preprocess=_preprocess, postprocess=_postprocess)
"""The pane; as an input it gives a list of `Message`, as an output it takes one."""


def chat_pane(**options: Any) -> gr.Chatbot:  # Any: Chatbot's own options
    """A pane with the options that all panes of the page share."""
    pane: gr.Chatbot = ChatPane(
        latex_delimiters=LATEX_DELIMITERS,
        sanitize_html=True,
        allow_tags=list(SHOWN_AS_TEXT),
        allow_file_downloads=False,
        group_consecutive_messages=False,
        show_label=False,
        container=False,
        layout="bubble",
        **options,
    )
    return pane


def up_to_question(turns: Sequence[Message]) -> list[Message]:
    """The turns up to the last question."""
    last = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=-1)
    return list(turns[: last + 1])


def event_index(event: gr.RetryData | gr.UndoData | gr.EditData) -> int:
    """Which message an event is about: a number that a browser sent."""
    index = event.index[0] if isinstance(event.index, list | tuple) else event.index
    return index if isinstance(index, int) and index >= 0 else 0


def _text_of(message: PaneMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content)


def _mark_of(message: PaneMessage) -> AnswerMark | None:
    mark = message.metadata
    if mark is None or not mark.answer_id or not mark.model:
        return None
    return AnswerMark(mark.answer_id, mark.model, mark.vote)


def _shown(message: Message) -> PaneMessage:
    return PaneMessage.model_construct(
        role=message.role,
        content=[TextPart.model_construct(text=message.text, type="text")],
        metadata=None if message.mark is None else PaneMark.model_construct(**asdict(message.mark)),
    )
