"""`fastchat <command>`: the table of commands, quick and helpful."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

from fastchat import __version__
from fastchat.serve.main import COMMANDS
from tests.processes import ROOT, process_environment


def fastchat(*words):
    return subprocess.run(
        [sys.executable, "-m", "fastchat", *words],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("words", [(), ("--help",)], ids=str)
def test_help_names_every_command(words):
    """On stdout, with exit code 0."""
    ended = fastchat(*words)
    assert ended.returncode == 0
    assert all(f"  {command.name} " in ended.stdout for command in COMMANDS)


def test_help_imports_no_command():
    """So that it is there at once: nothing but the standard library is loaded."""
    words = "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names), file=sys.stderr)"
    program = (
        f"import atexit, sys\natexit.register(lambda: {words})\nfrom fastchat.serve.main import main\nmain(['--help'])"
    )
    ended = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**process_environment(), "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert set(ended.stderr.split()) == {"__main__", "fastchat"}


def test_version_is_the_package_s():
    """For bug reports."""
    assert fastchat("--version").stdout == f"fastchat {__version__}\n"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("srve", "did you mean `fastchat serve`?"),
        ("model_worker", "did you mean `fastchat model-worker`?"),
        ("xyz", "the commands are serve, "),
    ],
)
def test_unknown_command_is_one_line_with_what_to_type(word, hint):
    """Exit code 2."""
    ended = fastchat(word)
    assert ended.returncode == 2
    assert hint in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("serve", "--load8bit"), "unrecognized arguments: --load8bit; did you mean --load-8bit?"),
        (("chat", "--modle=x"), "unrecognized arguments: --modle=x; did you mean --model?"),
        (("serve", "models/llama"), "unrecognized arguments: models/llama; did you mean --model-path models/llama?"),
        (("keys",), "the following arguments are required: ACTION."),
        (("serve", "--memory", "20GIG"), "write it like 24GiB, 512MB or 1000000."),
    ],
    ids=str,
)
def test_wrong_flag_is_one_line_with_what_to_type(words, told):
    """No list of all flags before it; the line says how to see that."""
    ended = fastchat(*words)
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert line.endswith(f"{told} `fastchat {words[0]} --help` lists the flags.")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_a_main_that_takes_its_flags(command):
    """And gives the exit code back."""
    main = importlib.import_module(command.module).main
    assert list(inspect.signature(main).parameters) == ["argv"]


def test_command_shares_its_flags_with_the_guide_s_module():
    """`fastchat controller --help` is `python3 -m fastchat.serve.controller --help`."""
    ended = fastchat("controller", "--help")
    assert ended.returncode == 0
    assert "--dispatch-method" in ended.stdout


def test_a_name_that_the_locale_cannot_write_ends_no_command():
    """Its letters are written as escapes."""
    program = (
        "import sys\nfrom fastchat.serve.arguments import run_command\n"
        "run_command(lambda _: print('models', '\u5c0f', flush=True) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=process_environment({"PYTHONIOENCODING": "latin-1"}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (0, "models \\u5c0f\n"), ended.stderr
