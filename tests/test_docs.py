"""Documents say what is there: module list, links, code blocks in both languages, flags."""

import re
from pathlib import Path

import pytest

from scripts.write_module_list import DOCUMENT, ROOT, updated
from tests.processes import run_command

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def code_blocks(path: Path) -> list[str]:
    return re.findall(r"^```[a-z]*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def without_comments(block: str) -> str:
    return "\n".join(line.split("  #")[0].rstrip() for line in block.splitlines())


def test_architecture_lists_every_module():
    """One line per module, its docstring's first sentence (python scripts/write_module_list.py)."""
    assert DOCUMENT.read_text() == updated(DOCUMENT.read_text())


@pytest.mark.parametrize("name", ["README.md", "docs/guide.md"])
def test_both_languages_have_the_same_commands(name):
    """What can be copied is the same in both languages, comments aside."""
    english, chinese = ROOT / name, ROOT / name.replace(".md", ".zh-CN.md")
    assert code_blocks(english)
    assert [without_comments(block) for block in code_blocks(english)] == [
        without_comments(block) for block in code_blocks(chinese)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    """Relative links name files of the repository."""
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_commands_name_real_modules_and_flags(tmp_path):
    """Every `python3 -m fastchat.serve.X` exists, and so does every flag given to it."""
    flags: dict[str, set[str]] = {}
    for name in ("README.md", "docs/guide.md", "docs/terminal-session.md"):
        commands = re.findall(r"python3 -m fastchat\.serve\.(\w+)((?:[^\n]|\\\n)*)", (ROOT / name).read_text())
        assert commands, name
        for module, rest in commands:
            flags.setdefault(module, set()).update(re.findall(r"--[a-z][a-z-]+", rest))
    for module, named in flags.items():
        shown = run_command(module, "--help", state_dir=tmp_path)
        assert shown.returncode == 0, module
        assert not {flag for flag in named if flag not in shown.stdout}, module
