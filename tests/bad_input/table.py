"""All rows in order, and the table of docs/bad-input.md that is made from them."""

from __future__ import annotations

from collections import Counter

from tests.bad_input import feature_rows, field_rows, http_rows
from tests.bad_input.cases import Row
from tests.processes import ROOT

ROWS: tuple[Row, ...] = tuple(
    sorted((*http_rows.ROWS, *field_rows.ROWS, *feature_rows.ROWS), key=lambda row: row.number)
)
DOCUMENT = ROOT / "docs" / "bad-input.md"
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"


def updated(text: str) -> str:
    """The document with its table made anew."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    lines = ["| id | about | what holds | requests and their answers |", "|---|---|---|---|", *map(_line, ROWS)]
    return "\n".join([before + _BEGIN, *lines, _END + after])


def _line(row: Row) -> str:
    answers = Counter(case.answer for case in row.cases)
    counted = ", ".join(f"{number} x {answer}" for answer, number in answers.most_common())
    return f"| {row.number} | {row.title} | {row.rule} | {counted} |"
