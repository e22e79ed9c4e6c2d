"""docs/security.md and the tests have the same rows."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.processes import ROOT

ROW = re.compile(
    r"^\| ((?:CVE|issue|finding|chatglm3)-[\w-]+|C\d\d) \|.*\| (passes(?:, differs: [^|]+)?) \|$", re.MULTILINE
)
ID = re.compile(r"cve_\d{4}_\d+|issue_\d+|finding_[a-z]\b|finding_[a-z](?=_)|chatglm3_\d+|(?<=_)c\d\d(?=_)")


def ids_of_the_tests() -> set[str]:
    """The ids in the names of this folder's tests."""
    names = [
        node.name
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    return {found for name in names for found in ID.findall(name)}


def test_every_row_has_a_test_and_every_test_a_row():
    """And each row says what came out."""
    text = (ROOT / "docs" / "security.md").read_text()
    rows = [row[0].lower().replace("-", "_") for row in ROW.findall(text)]
    assert len(rows) == len(set(rows)) == 39
    assert len(re.findall(r"^\| (?!id |---)", text, re.MULTILINE)) == len(rows)
    assert set(rows) == ids_of_the_tests()
