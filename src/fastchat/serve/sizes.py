"""Bytes as people read them."""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def size_text(num_bytes: int) -> str:
    """A size for reading, to three digits or so."""
    size = float(num_bytes)
    for unit in _UNITS:
        if size < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{num_bytes:,} bytes" if unit == "bytes" else f"{size:.2f} {unit}"
