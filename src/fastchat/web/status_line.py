"""What the tabs share: marks of their events, and the line between conversation and message box."""

from __future__ import annotations

from html import escape
from typing import Any

from fastchat.web.translation import Language, translate

HIDDEN: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""No event of the page is anybody's API, and none draws a spinner over what it changes."""


def notice(text: str, language: Language, *, can_retry: bool = False) -> str:
    """A sentence that wants to be read, with a button to try again where that may help."""
    words = escape(translate(language, "try_again"))
    button = f'<button type="button" data-press="retry-switch">{words}</button>' if can_retry else ""
    return f'<div class="notice" role="alert"><span>{escape(text)}</span>{button}</div>'
