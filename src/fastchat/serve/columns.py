"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as a terminal shows their widest cell: a Chinese character takes two places."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()
