"""The leaderboard: a table and a plot of the intervals, drawn here as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from html import escape
from typing import Any

import gradio as gr

from fastchat.errors import FastChatError
from fastchat.web.api_client import ApiClient
from fastchat.web.components import PlainDropdown
from fastchat.web.failures import failure_of
from fastchat.web.status_line import HIDDEN, notice
from fastchat.web.translation import Language, label, language_of, translate

_DAYS = {"all": None, "30": 30, "7": 7}
_LANGUAGES = ("all", "en", "zh")
_COLUMNS = ("rank", "model", "score", "interval", "votes", "wins", "losses", "ties")
_WIDTH, _ROW, _LEFT, _RIGHT = 760, 34, 220, 24
Board = Mapping[str, Any]  # Any: JSON
Row = Mapping[str, Any]


class LeaderboardTab:
    """The tab; its content is asked for whenever it is opened."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client

    def build(self, tab: gr.Tab) -> None:
        """Lay the tab out and listen to it; called within `tab`."""
        with gr.Column(elem_id="leaderboard-main"):
            with gr.Row(elem_id="leaderboard-bar"):
                days = _choice("window", [(label(f"window_{name}"), name) for name in _DAYS])
                language = _choice("language_of_votes", [(label(f"votes_{name}"), name) for name in _LANGUAGES])
                refresh = gr.Button(label("refresh"), size="sm", elem_id="leaderboard-refresh")
            board = gr.HTML("", elem_id="leaderboard", js_on_load=None, apply_default_css=False)
        gr.on([tab.select, days.change, language.change, refresh.click], self.show, [days, language], [board], **HIDDEN)

    async def show(self, days: Any, language_of_votes: Any, request: gr.Request) -> str:
        """The board as HTML."""
        language = language_of(request)
        query = {"language": language_of_votes} if language_of_votes in _LANGUAGES[1:] else {}
        num_days = _DAYS.get(days) if isinstance(days, str) else None
        if num_days is not None:
            query["since"] = (datetime.now(UTC) - timedelta(days=num_days)).isoformat(timespec="seconds")
        try:
            board = await self._client.get_json("/api/v1/leaderboard", query)
        except FastChatError as error:
            return notice(failure_of(error, "").text(language), language)
        return board_html(board, language)


def board_html(board: Board, language: Language) -> str:
    """Table and plot of a board; what it names is text."""
    rows: Sequence[Row] = board["models"]
    if not rows:
        return f'<p class="empty">{escape(translate(language, "no_votes"))}</p>'
    head = "".join(f'<th scope="col">{escape(translate(language, f"column_{name}"))}</th>' for name in _COLUMNS)
    body = "".join(_table_row(row) for row in rows)
    told = escape(translate(language, "board_told", count=board["num_votes"]))
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"{_plot(rows, language)}{table}<p>{told}</p>"


def _table_row(row: Row) -> str:
    low, high = row["interval"]
    cells = (
        row["rank"],
        row["model"],
        f"{row['score']:.0f}",
        f"{low:.0f} – {high:.0f}",
        row["num_votes"],
        row["wins"],
        row["losses"],
        row["ties"] + row["both_bad"],
    )
    return "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>"


def _plot(rows: Sequence[Row], language: Language) -> str:
    """One line for each model: its interval, and a dot at its score."""
    lowest = min(row["interval"][0] for row in rows)
    highest = max(row["interval"][1] for row in rows)
    scale = (_WIDTH - _LEFT - _RIGHT) / max(highest - lowest, 1.0)
    height = _ROW * (len(rows) + 1)
    title = escape(translate(language, "plot_title"))
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{title}"><title>{title}</title>',
        f'<text class="axis" x="{_LEFT}" y="{height - 10}">{lowest:.0f}</text>',
        f'<text class="axis" x="{_WIDTH - _RIGHT}" y="{height - 10}" text-anchor="end">{highest:.0f}</text>',
    ]
    for number, row in enumerate(rows):
        y = _ROW * number + _ROW / 2
        low, high, score = (_LEFT + (value - lowest) * scale for value in (*row["interval"], row["score"]))
        parts += [
            f'<text x="{_LEFT - 16}" y="{y + 5}" text-anchor="end">{escape(_shortened(row["model"]))}</text>',
            f'<line x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/><circle cx="{score:.1f}" cy="{y}" r="5.5"/>',
        ]
    return "".join([*parts, "</svg>"])


def _shortened(name: str) -> str:
    return name if len(name) <= 26 else f"{name[:25]}…"


def _choice(key: str, choices: Sequence[tuple[Any, str]]) -> Any:  # Any: Gradio's own
    return PlainDropdown(
        choices=list(choices), value=choices[0][1], label=label(key), elem_id=key.replace("_", "-"), min_width=150
    )
