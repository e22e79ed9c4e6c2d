"""Gradio's components with other ideas of what a browser may send."""

from __future__ import annotations

from abc import ABCMeta
from typing import Any

import gradio as gr


def variant_of(base: type[gr.components.Component], **members: Any) -> Any:  # Any: a class that mypy cannot follow
    """A subclass of `base` that the browser draws as `base`.

    Gradio's own metaclass writes a stub file beside the source of every subclass; this goes around it.
    """
    names = {"is_template": True, "__module__": __name__, **members}
    return ABCMeta.__new__(type(base), f"Plain{base.__name__}", (base,), names)


def _as_it_came(_self: Any, payload: Any) -> Any:
    """What the browser sent: judged where it is used, with a message in the reader's language."""
    return payload


PlainDropdown = variant_of(gr.Dropdown, preprocess=_as_it_came)
PlainSlider = variant_of(gr.Slider, preprocess=_as_it_came)
