"""Keeps the module list of docs/architecture.md true: one line per module, the first sentence of its docstring.

`python scripts/write_module_list.py` rewrites the list; tests/test_docs.py fails when it is out of date.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "fastchat"
DOCUMENT = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: begin -->\n", "<!-- modules: end -->\n"


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def module_list() -> str:
    """All modules with their first sentences, by folder."""
    lines: list[str] = []
    folder = None
    for path in sorted(PACKAGE.rglob("*.py"), key=lambda path: (path.parent != PACKAGE, path)):
        if path.name in ("__init__.py", "__main__.py"):
            continue
        if path.parent != folder:
            folder = path.parent
            name = folder.relative_to(PACKAGE.parent)
            lines += ["", f"**`{name}/`**", ""]
        lines.append(f"- `{path.name}`: {first_sentence(path)}")
    return "\n".join(lines).strip() + "\n"


def updated(document: str) -> str:
    """The document with its list replaced."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin, f"{DOCUMENT} lacks its first marker"
    assert end, f"{DOCUMENT} lacks its last marker"
    return f"{before}{BEGIN}{module_list()}{END}{after}"


if __name__ == "__main__":
    DOCUMENT.write_text(updated(DOCUMENT.read_text()))
