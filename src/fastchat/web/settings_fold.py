"""The fold with what changes an answer."""

from __future__ import annotations

from typing import Any

import gradio as gr

from fastchat.web.components import PlainSlider
from fastchat.web.translation import label


class SettingsFold:
    """System prompt, sampling and limits. `components` is in the order of `RawSettings` after the model."""

    def __init__(self, prefix: str = "") -> None:
        with gr.Accordion(label("settings"), open=False, elem_id=f"{prefix}settings", elem_classes="settings"):
            self.system = gr.Textbox(
                label=label("system_prompt"),
                placeholder=label("system_placeholder"),
                lines=2,
                max_lines=8,
                elem_id=f"{prefix}system",
            )
            with gr.Row():
                self.temperature = _slider(prefix, "temperature", value=0.7, lowest=0, highest=2, step=0.1)
                self.top_p = _slider(prefix, "top_p", value=1.0, lowest=0.05, highest=1, step=0.05)
            with gr.Row():
                self.max_tokens = _optional_number(prefix, "max_tokens")
                self.seed = _optional_number(prefix, "seed")
            if not prefix:  # the page's own switches, once
                gr.HTML('<div id="settings-end"></div>', js_on_load=None, apply_default_css=False)

    @property
    def components(self) -> tuple[Any, ...]:
        """All of them."""
        return self.system, self.temperature, self.top_p, self.max_tokens, self.seed


def _slider(prefix: str, key: str, *, value: float, lowest: float, highest: float, step: float) -> Any:  # Any: Gradio's
    return PlainSlider(
        lowest,
        highest,
        value,
        step=step,
        label=label(key),
        info=label(f"{key}_info"),
        elem_id=f"{prefix}{key}",
        buttons=[],
    )


def _optional_number(prefix: str, key: str) -> gr.Textbox:
    """A box of text: Gradio's box for numbers shows 0 for none."""
    return gr.Textbox(
        label=label(key), info=label(f"{key}_info"), placeholder="–", max_lines=1, elem_id=f"{prefix}{key}"
    )
