"""All rows in order, and the table of docs/bad-input.md that is made from them."""

from __future__ import annotations

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
    return f"{before}{_BEGIN}\n{''.join(map(_section, ROWS))}{_END}{after}"


def _section(row: Row) -> str:
    lines = dict.fromkeys(f"| {case.what} | {case.answer} |" for case in row.cases)
    return (
        f"\n### {row.number}: {row.title}\n\n{row.rule}\n\n| sent | answer |\n|---|---|\n" + "\n".join(lines) + "\n\n"
    )
