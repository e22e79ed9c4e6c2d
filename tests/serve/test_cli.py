"""`python3 -m fastchat.serve.cli` as a process: with pipes, on a pseudo-terminal, for programs."""

import json
import re
import subprocess
import sys
import time

import pytest

from fastchat.errors import ConfigError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.tokenizer import load_tokenizer
from fastchat.serve.cli import main
from fastchat.terminal.session import LATE_INTERRUPT_S
from tests.checkpoints import write_checkpoint
from tests.processes import ROOT, process_environment
from tests.terminal.pty_session import CTRL_C, PtySession

MODULE = "fastchat.serve.cli"
ENGINE_FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "32MiB")
# As FastChat's tests write their inputs (tests/test_cli_inputs.txt of lm-sys/FastChat, in other words).
PROGRAM_INPUTS = (
    "你是谁？ __END_OF_A_MESSAGE_47582648__\n"
    "Two lines,\none message. __END_OF_A_MESSAGE_47582648__\n"
    "!!remove __END_OF_A_MESSAGE_47582648__\n"
    "!!exit __END_OF_A_MESSAGE_47582648__\n"
)


def cli(*flags, typed=""):
    return subprocess.run(
        [sys.executable, "-m", MODULE, *map(str, flags)],
        cwd=ROOT,
        env=process_environment(),
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )


def test_piped_conversation_keeps_its_labels_and_is_saved(model_folder, tmp_path):
    """Labels and answers go out without a terminal; --debug tells prompt and speed; `--model` is a prefix."""
    typed = f"你是谁？\n!!save {tmp_path}/talk\n!!regen\n!!load {tmp_path}/talk\n如何使用fastchat\n"
    flags = ("--model", model_folder, *ENGINE_FLAGS, "--temperature", "0", "--max-new-tokens", "12", "--debug")
    result = cli(*flags, typed=typed)
    assert result.returncode == 0, result.stderr
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert list(saved) == ["template_name", "system_message", "roles", "messages", "offset"]
    assert (saved["template_name"], saved["roles"]) == ("chatglm2", ["问", "答"])
    question, answer = saved["messages"]
    assert question == ["问", "你是谁？"]
    exchange = f"问: 你是谁？\n答: {answer[1]}\n"
    commands = [f"问: !!save {tmp_path}/talk\n", "问: !!regen\n", f"问: !!load {tmp_path}/talk\n"]
    shown = f"{exchange}{commands[0]}{commands[1]}答: {answer[1]}\n{commands[2]}{exchange}问: 如何使用fastchat\n答: "
    assert result.stdout.startswith(shown)
    assert result.stdout.endswith("\n问: \n")
    assert "问：你是谁？" in result.stderr
    assert re.search(r"prompt: \d+ tokens.*12 tokens, [\d.]+ tokens/s", result.stderr)


def test_programmatic_style_is_byte_for_byte_fastchats(model_folder):
    """Inputs end with the mark, both sides are prefixed; an input of several lines is one message."""
    flags = ("--model-path", model_folder, *ENGINE_FLAGS, "--style", "programmatic", "--max-new-tokens", "4")
    result = cli(*flags, "--seed", "1", typed=PROGRAM_INPUTS)
    assert result.returncode == 0, result.stderr
    pattern = (
        r"\[!OP:问\]: 你是谁？\n\[!OP:答\]: (.*?)\n\[!OP:问\]: Two lines,\none message\.\n\[!OP:答\]: (.*?)\n"
        r"\[!OP:问\]: !!remove\n\[!OP:问\]: !!exit\n"
    )
    assert re.fullmatch(pattern, result.stdout, re.DOTALL), result.stdout


def test_terminal_session_in_chinese_with_ctrl_c(model_folder):
    """The guide's session: a bar over the shards, labels, text as it comes; Ctrl-C stops an answer, a line, all."""
    flags = ("--model-path", model_folder, *ENGINE_FLAGS, "--temperature", "0", "--max-new-tokens", "30000")
    with PtySession(MODULE, *flags) as session:
        session.wait_for(r"Loading checkpoint shards: 100%\|.*3/3")
        session.wait_for("问: ")
        session.type("你是谁？\n")
        session.wait_for("你是谁？\n答: .{10}")
        session.type(CTRL_C)
        session.wait_for("this exchange is dropped\n问: ")
        session.type("!!regen\n")
        session.wait_for("no question to answer again\n问: ")
        time.sleep(LATE_INTERRUPT_S)  # a Ctrl-C sooner after an answer is taken for the answer's
        session.type("半句话")
        session.wait_for("半句话")
        session.type(CTRL_C)  # drops the line alone
        session.wait_for("问: ")
        session.type(CTRL_C)
        assert session.wait() == 0


def test_own_format_of_the_documentation(model_folder, tmp_path):
    """The example of docs/prompt-formats.md is a working file, and makes the prompt that stands there."""
    page = (ROOT / "docs" / "prompt-formats.md").read_text(encoding="utf-8")
    example, prompt = re.search(r"```json\n(.*?)```.*?```text\n(.*?)\n```", page, re.DOTALL).groups()
    file = tmp_path / "my-format.json"
    file.write_text(example, encoding="utf-8")
    flags = ("--model-path", model_folder, *ENGINE_FLAGS, "--max-new-tokens", "4", "--debug")
    result = cli(*flags, "--conv-template", file, typed="Are you open?\n")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("客户: Are you open?\n客服: ")
    assert repr(prompt)[1:-1] in result.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"name": "x", "user": [], "assistant": [], "generation": [], "roles": ["a"]}', "'roles' must be two labels"),
        ('{"name": "x", "user": "text", "assistant": [], "generation": []}', "'user' must be a list of pieces"),
        ('{"name": "x"}', "the key 'user' is missing"),
        ('{"nom": "x"}', "unknown key 'nom'"),
        ('{"name": "x", "user": [{"token": "<|no|>"}], "assistant": [], "generation": []}', "the token <|no|>"),
        ("not json", "not a readable chat format"),
        (None, "not a readable chat format"),
    ],
)
def test_bad_format_is_one_line_with_file_and_key(tmp_path, content, reason):
    """Told by `models inspect`, by the terminal and by a worker in the same words, since they share the loading."""
    file = tmp_path / "format.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "model", "chatglm2"))
    with pytest.raises(ConfigError) as error:
        load_chat_format(checkpoint, load_tokenizer(checkpoint), str(file))
    assert reason in error.value.message
    assert "\n" not in error.value.message
    assert str(file) in error.value.message or "the chat format x" in error.value.message


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--load-8bit", "--quantize", "int4"), "contradict each other"),
        (("--quantize-group-size", "32"), "works with --quantize int4 only"),
        (("--judge-sent-end",), "--judge-sent-end is not supported"),
        (("--temperature", "3"), "3 is not from 0 to 2"),
        (("--top-p", "0"), "0 is not above 0 to 1"),
        (("--num-gpus", "2"), "--num-gpus 2 is not supported"),
        (("--multiline",), "--multiline works with --style rich only"),
    ],
)
def test_flag_that_cannot_be_obeyed_is_refused_before_anything_is_loaded(model_folder, flags, reason, capsys):
    """By the parser, or as a `ConfigError`, which `run_command` makes the same line and exit code of."""
    with pytest.raises((SystemExit, ConfigError)) as refused:
        main(["--model-path", str(model_folder), *flags])
    if isinstance(refused.value, ConfigError):
        assert reason in refused.value.message
    else:
        assert refused.value.code == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_folder_that_is_no_model_is_one_line(tmp_path):
    result = cli("--model-path", tmp_path)
    assert result.returncode == 2
    assert (
        result.stderr == f"error: {tmp_path}: no config.json; the folder is not a complete model, download it again\n"
    )


def test_without_a_model_the_demo_answers():
    """And says in one line that it is tiny, and how to give a real one."""
    result = cli(*ENGINE_FLAGS, "--temperature", "0", typed="你是谁？\n")
    assert result.returncode == 0, result.stderr
    assert "ChatGLM2-Demo" in result.stdout
    assert result.stderr.count("tiny demo; talk with a real one with --model-path FOLDER") == 1
