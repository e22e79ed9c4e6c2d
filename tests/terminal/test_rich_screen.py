"""The style `rich`: what is finished scrolls away, commands complete, and a session on a real terminal."""

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from fastchat.terminal.rich_screen import CommandCompleter, split_finished
from tests.terminal.conftest import ENGINE_FLAGS
from tests.terminal.pty_session import CTRL_C, CTRL_D, PtySession


@pytest.mark.parametrize(
    ("text", "finished", "rest"),
    [
        ("one", "", "one"),
        ("one\n\ntwo", "one", "two"),
        ("one\n\ntwo\n\n", "one\n\ntwo", ""),
        ("one\n\n```\ncode\n\nmore", "one", "```\ncode\n\nmore"),
        ("```\ncode\n\nmore\n```\n\nafter", "```\ncode\n\nmore\n```", "after"),
    ],
)
def test_only_whole_paragraphs_are_finished(text, finished, rest):
    """A blank line inside a code fence is part of the code."""
    assert split_finished(text) == (finished, rest)


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("!!", ["!!exit", "!!reset", "!!remove", "!!regen", "!!save", "!!load"]),
        ("!!re", ["!!reset", "!!remove", "!!regen"]),
        ("say !!", []),
        ("hello", []),
    ],
)
def test_commands_complete_at_the_start_of_a_line(typed, names):
    completions = CommandCompleter().get_completions(Document(typed), CompleteEvent())
    assert [completion.text for completion in completions] == names


def test_file_completes_behind_its_command(tmp_path):
    (tmp_path / "talk.json").touch()
    completions = CommandCompleter().get_completions(Document(f"!!load {tmp_path}/ta"), CompleteEvent())
    assert [completion.text for completion in completions] == ["lk.json"]


def test_session_with_history_and_ctrl_c(model_folder):
    """The arrow key brings the question back; Ctrl-C drops a typed line, and ends where nothing is typed."""
    flags = ("--model-path", model_folder, *ENGINE_FLAGS, "--style", "rich", "--temperature", "0")
    with PtySession(
        "fastchat.serve.cli", *flags, "--max-new-tokens", "5", environment={"TERM": "xterm-256color"}
    ) as session:
        session.wait_for("问:")
        session.type("你是谁？\n")
        session.wait_for("答:")
        session.wait_for("问:")
        session.type("\x1b[A")
        session.wait_for("你是谁？")
        session.type("\n")
        session.wait_for("答:")
        session.wait_for("问:")
        session.type("half a line")
        session.wait_for("half a line")
        session.type(CTRL_C)
        session.wait_for("问:")
        assert session.press_until_end(CTRL_D) == 0
