"""Line plots as SVG, written by hand: a figure of the documents is a text file that a reviewer can read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 800, 430
LEFT, RIGHT, TOP, BOTTOM = 70, 230, 40, 50
COLOURS = ("#0b62a4", "#d1495b", "#2e8b57", "#edae49", "#6a4c93", "#00798c", "#8d6346", "#5c6b73")
NUM_TICKS = 5


@dataclass(frozen=True)
class Series:
    """One line, or loose dots. `colour` is the number of one of `COLOURS`."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    is_line: bool = True
    is_dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What it shows. A logarithmic axis has a tick at every power of `base`."""

    label: str
    base: int = 0

    def place(self, low: float, high: float) -> Callable[[float], float]:
        """From a value to 0..1."""
        if self.base:
            span = math.log(high / low) or 1.0
            return lambda value: math.log(value / low) / span
        return lambda value: (value - low) / ((high - low) or 1.0)

    def range_of(self, values: Sequence[float]) -> tuple[float, float]:
        """Round ends that hold all values; a linear axis begins at 0."""
        if self.base:
            low, high = (math.log(value, self.base) for value in (min(values), max(values)))
            return float(self.base) ** math.floor(low + 1e-9), float(self.base) ** math.ceil(high - 1e-9)
        return 0.0, tick_step(max(values)) * math.ceil(max(values) / tick_step(max(values)) - 1e-9)

    def ticks(self, low: float, high: float) -> list[float]:
        """Where lines of the grid go."""
        if self.base:
            count = round(math.log(high / low, self.base))
            return [low * self.base**power for power in range(count + 1)]
        step = tick_step(high)
        return [step * number for number in range(round(high / step) + 1)]


def tick_step(high: float) -> float:
    """1, 2 or 5 times a power of ten, for about five ticks."""
    raw = high / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


def line_plot(title: str, x_axis: Axis, y_axis: Axis, series: Sequence[Series]) -> str:
    """A whole SVG file."""
    series = [each for each in series if each.points]
    x_low, x_high = x_axis.range_of([x for each in series for x, _ in each.points])
    y_low, y_high = y_axis.range_of([y for each in series for _, y in each.points])
    x_share, y_share = x_axis.place(x_low, x_high), y_axis.place(y_low, y_high)

    def x_of(value: float) -> float:
        return LEFT + x_share(value) * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return HEIGHT - BOTTOM - y_share(value) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 16, title, size=15),
    ]
    for tick in x_axis.ticks(x_low, x_high):
        parts.append(_grid_line(x_of(tick), TOP, x_of(tick), HEIGHT - BOTTOM))
        parts.append(_text(x_of(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", anchor="middle"))
    for tick in y_axis.ticks(y_low, y_high):
        parts.append(_grid_line(LEFT, y_of(tick), WIDTH - RIGHT, y_of(tick)))
        parts.append(_text(LEFT - 6, y_of(tick) + 4, f"{tick:g}", anchor="end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_axis.label, anchor="middle"))
    parts.append(f'<g transform="rotate(-90 16 {HEIGHT / 2:.0f})">')
    parts.append(_text(16, HEIGHT / 2, y_axis.label, anchor="middle") + "</g>")
    for number, each in enumerate(series):
        parts += _drawn(each, [(x_of(x), y_of(y)) for x, y in sorted(each.points)])
        parts += _drawn(
            each, [(WIDTH - RIGHT + 14, TOP + 10 + 20 * number), (WIDTH - RIGHT + 34, TOP + 10 + 20 * number)]
        )
        parts.append(_text(WIDTH - RIGHT + 40, TOP + 14 + 20 * number, each.name))
    return "\n".join([*parts, "</svg>", ""])


def _drawn(series: Series, places: Sequence[tuple[float, float]]) -> list[str]:
    colour = COLOURS[series.colour % len(COLOURS)]
    parts = []
    if series.is_line:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dashes = ' stroke-dasharray="6 4"' if series.is_dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>')
    if not series.is_dashed:
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    return parts


def _grid_line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(words)}</text>'
