"""Writes the table of docs/bad-input.md from the cases of tests/bad_input; a test compares."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.bad_input.table import DOCUMENT, updated

if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
