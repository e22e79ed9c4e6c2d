"""Gradio's components with other ideas of what a browser may send, and of what an update costs."""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import gradio as gr


class _AsItIs:
    """The mark's class."""


AS_IT_IS = _AsItIs()
"""An output that stays as it is. Gradio's own mark, `gr.skip()`, builds the component anew for every update, which
takes longer than the update itself."""


def variant_of(base: type[gr.components.Component], **members: Any) -> Any:  # Any: a class that mypy cannot follow
    """A subclass of `base` that the browser draws as `base`.

    Gradio's own metaclass writes a stub file beside the source of every subclass; this goes around it.
    """
    names = {"is_template": True, "__module__": __name__, **members}
    return ABCMeta.__new__(type(base), f"Plain{base.__name__}", (base,), names)


def can_stay(postprocess: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A component's `postprocess` that knows `AS_IT_IS` too."""

    def for_the_browser(component: Any, value: Any) -> Any:
        return gr.skip() if value is AS_IT_IS else postprocess(component, value)

    return for_the_browser


def _as_it_came(_self: Any, payload: Any) -> Any:
    """What the browser sent: judged where it is used, with a message in the reader's language."""
    return payload


PlainDropdown = variant_of(gr.Dropdown, preprocess=_as_it_came)
PlainSlider = variant_of(gr.Slider, preprocess=_as_it_came)
PlainTextbox = variant_of(gr.Textbox, postprocess=can_stay(gr.Textbox.postprocess))
PlainHTML = variant_of(gr.HTML, postprocess=can_stay(gr.HTML.postprocess))
