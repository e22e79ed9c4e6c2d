"""Every text of the page, in each of its languages: one table per language in `texts/`, with the same keys."""

from __future__ import annotations

import json
import re
from functools import cache
from importlib import resources
from typing import Any, Literal

import gradio as gr

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
LANGUAGE_COOKIE = "fastchat_language"
_PLACE = re.compile(r"\{(\w+)\}")


@cache
def texts(language: Language) -> dict[str, str]:
    """One language's table."""
    raw = resources.files("fastchat.web").joinpath("texts", f"{language}.json").read_text(encoding="utf-8")
    table: dict[str, str] = json.loads(raw)
    return table


def translate(language: Language, key: str, **facts: object) -> str:
    """One text, with its facts filled in."""
    # Not `format`: a text may be missing a fact, and a fact may hold braces.
    return _PLACE.sub(lambda place: str(facts.get(place[1], place[0])), texts(language)[key])


def label(key: str) -> Any:  # Any: Gradio's marker, which its components take for a string
    """A text that the browser puts in its own language, for labels and placeholders."""
    assert key in texts("en"), key
    return gr.I18n()(key)


def gradio_tables() -> gr.I18n:
    """The tables as Gradio's browser side looks them up."""
    chinese = texts("zh")
    return gr.I18n(en=texts("en"), **{"zh": chinese, "zh-CN": chinese, "zh-TW": chinese, "zh-HK": chinese})


def language_of(request: gr.Request | None) -> Language:
    """The language of who asks: what was chosen on the page, else what the browser prefers."""
    if request is None:
        return "en"
    chosen = request.cookies.get(LANGUAGE_COOKIE)
    if chosen in LANGUAGES:
        return "zh" if chosen == "zh" else "en"
    first = str(request.headers.get("accept-language", "")).split(",")[0]
    return "zh" if first.strip().lower().startswith("zh") else "en"
