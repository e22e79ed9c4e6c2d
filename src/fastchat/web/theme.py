"""The page's colours and fonts, as a Gradio theme: system fonts only, so that none is ever fetched."""

from __future__ import annotations

import gradio as gr

_FONTS = ["system-ui", "-apple-system", "Segoe UI", "Noto Sans", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC"]
_MONO_FONTS = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Noto Sans Mono", "monospace"]
_GREEN = gr.themes.Color(
    c50="#eef7f4",
    c100="#d6ebe4",
    c200="#aed7ca",
    c300="#7fbdab",
    c400="#519d88",
    c500="#37806d",
    c600="#2f6f62",
    c700="#28594f",
    c800="#234841",
    c900="#1f3c37",
    c950="#0e221f",
)


def page_theme() -> gr.themes.Base:
    """Calm: one accent, much white, soft corners."""
    theme = gr.themes.Base(
        primary_hue=_GREEN,
        neutral_hue=gr.themes.colors.stone,
        font=[*_FONTS, "sans-serif"],
        font_mono=_MONO_FONTS,
        radius_size=gr.themes.sizes.radius_lg,
    )
    theme.set(
        body_background_fill="#fbfaf8",
        body_background_fill_dark="#191a1b",
        background_fill_primary_dark="#212324",
        background_fill_secondary_dark="#191a1b",
        block_background_fill_dark="#212324",
        input_background_fill="#ffffff",
        input_background_fill_dark="#26282a",
        border_color_primary="#e7e4df",
        border_color_primary_dark="#34373a",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_text_color="#ffffff",
        block_shadow="none",
        block_label_text_size="*text_sm",
    )
    return theme
