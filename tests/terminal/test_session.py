"""What a session makes of its lines, with a scripted model: history, commands, failures."""

import json
import re

import pytest

from fastchat.terminal.conversation import load_conversation
from fastchat.terminal.screen import choose_from, visible
from fastchat.terminal.talker import AnswerOptions
from tests.terminal.conftest import TypedScreen

FASTCHAT_FILE = {
    "template_name": "vicuna_v1.1",
    "system_message": "Be brief.",
    "roles": ["USER", "ASSISTANT"],
    "messages": [["USER", "你好"], ["ASSISTANT", "你好！"], ["USER", "more"], ["ASSISTANT", "no"]],
    "offset": 0,
}


def event(text=None, *, finish=None, **fields):
    delta = {"content": text} if text else {}
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n\n"


def echo(body):
    """Answers with the number of the message and what was asked."""
    text = f"{len(body['messages'])}:{body['messages'][-1]['content']}"
    return [event(text[:2]), event(text[2:]), event(finish="stop"), b"data: [DONE]\n\n"]


def asked(talker):
    return [[message["content"] for message in body["messages"]] for body in talker.bodies]


def test_conversation_is_sent_whole(talk):
    """Each question brings what was said before; the screen shows labels and answers."""
    talker, screen = talk(["a", "b"], echo)
    assert asked(talker) == [["a"], ["a", "1:a", "b"]]
    assert screen.shown == "问: a\n答: 1:a\n问: b\n答: 3:b\n"


def test_no_history_sends_each_question_alone(talk):
    """Only the system message stays."""
    talker, _ = talk(["a", "b"], echo, has_history=False, system_message="S")
    assert asked(talker) == [["S", "a"], ["S", "b"]]


@pytest.mark.parametrize("ending", ["", "!!exit", "   "])
def test_empty_line_and_exit_end_the_session(talk, ending):
    """As in FastChat; what is typed behind it is not asked."""
    talker, _ = talk(["a", ending, "b"], echo)
    assert asked(talker) == [["a"]]


def test_reset_forgets_and_keeps_the_system_message(talk):
    talker, _ = talk(["a", "!!reset", "b"], echo, system_message="S")
    assert asked(talker) == [["S", "a"], ["S", "b"]]


def test_remove_takes_one_exchange_back(talk):
    talker, screen = talk(["a", "b", "!!remove", "c", "!!remove", "!!remove", "!!remove", "d"], echo)
    assert asked(talker)[2:] == [["a", "1:a", "c"], ["d"]]
    assert screen.notices[-1] == "there is nothing to remove"


def test_regen_asks_the_last_question_again(talk):
    talker, screen = talk(["!!regen", "a", "b", "!!regen", "c"], echo)
    assert asked(talker)[1:] == [["a", "1:a", "b"], ["a", "1:a", "b"], ["a", "1:a", "b", "3:b", "c"]]
    assert screen.notices == ["there is no question to answer again"]


@pytest.mark.parametrize("line", ["!!help", "!!quit", " !!Reset"])
def test_word_that_is_no_command_is_not_asked(talk, line):
    """It was meant as one, and the model would make something up."""
    talker, screen = talk([line, "a"], echo)
    assert asked(talker) == [["a"]]
    assert f"there is no {line.strip()}; the commands are !!exit" in screen.notices[0]


@pytest.mark.parametrize("line", ["!!", "!!!", "!!你好", "!!what is this", "!!reset the world"])
def test_other_lines_with_marks_are_questions(talk, line):
    """Only the commands themselves are commands."""
    talker, _ = talk([line], echo)
    assert asked(talker) == [[line]]


def test_failed_answer_leaves_the_conversation_and_can_be_asked_again(talk):
    """An error in the middle of a stream is one line; !!regen repeats the question that it hit."""
    failures = iter([[event("par"), b'data: {"error": {"message": "worker\\nlost", "code": null}}\n\n']])

    def script(body):
        return next(failures, None) or echo(body) if body["messages"][-1]["content"] == "b" else echo(body)

    talker, screen = talk(["a", "b", "!!regen", "c"], script)
    assert asked(talker)[1:] == [["a", "1:a", "b"], ["a", "1:a", "b"], ["a", "1:a", "b", "3:b", "c"]]
    assert screen.notices == ["error: worker lost (The conversation is kept; !!regen asks again.)"]


def test_stream_that_breaks_off_is_an_error(talk):
    """Neither an ending nor [DONE]: the text so far is no answer."""
    talker, screen = talk(["a", "b"], lambda _: [event("half")])
    assert asked(talker) == [["a"], ["b"]]
    assert screen.notices[0].startswith("error: The connection ended in the middle of the answer.")


def test_interrupted_answer_is_dropped(talk):
    """Ctrl-C in an answer drops the exchange; with !!regen the older answer stays."""
    interrupted = {"b", "stop"}

    def script(body):
        yield event("x")
        if body["messages"][-1]["content"] in interrupted:
            interrupted.clear()
            raise KeyboardInterrupt
        yield event(finish="stop")

    talker, screen = talk(["a", "b", "c"], script)
    assert asked(talker) == [["a"], ["a", "x", "b"], ["a", "x", "c"]]
    assert screen.notices == ["stopped; this exchange is dropped"]


def test_interrupt_at_the_prompt_ends_but_not_just_after_an_answer(talk):
    """One that comes as an answer ends was meant for the answer."""
    talker, _ = talk(["a", KeyboardInterrupt(), "b"], echo)
    assert asked(talker) == [["a"], ["a", "1:a", "b"]]
    talker, _ = talk([KeyboardInterrupt(), "b"], echo)
    assert asked(talker) == []


def test_longest_answer_gives_way_to_the_context(talk):
    """A limit that does not fit becomes what is left; a prompt that does not fit is told with its counts."""

    def script(body):
        if "max_tokens" in body or len(body["messages"]) > 1:
            message = "maximum context length is 20 tokens, but the prompt alone has 30 tokens"
            error = {"error": {"message": message, "code": "context_length_exceeded"}}
            return [b"data: " + json.dumps(error).encode() + b"\n\n"]
        return echo(body)

    talker, screen = talk(["a", "b"], script, options=AnswerOptions(max_tokens=512))
    assert asked(talker) == [["a"], ["a"], ["a", "1:a", "b"], ["a", "1:a", "b"]]
    assert "20 tokens" in screen.notices[-1]
    assert "30 tokens" in screen.notices[-1]
    assert "!!remove" in screen.notices[-1]


def test_options_go_into_the_request_only_where_given(talk):
    options = AnswerOptions(temperature=0.0, repetition_penalty=1.2, seed=0)
    talker, _ = talk(["a"], echo, options=options)
    assert talker.bodies == [
        {
            "model": "scripted",
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.0,
            "repetition_penalty": 1.2,
            "seed": 0,
        }
    ]


def test_saved_conversation_is_loaded_again(talk, tmp_path):
    """FastChat's format; `.json` is added; the conversation goes on where it was."""
    file = tmp_path / "talk.v1"
    _, screen = talk(["你好", f"!!save {file}"], echo, system_message="S")
    assert json.loads((tmp_path / "talk.v1.json").read_text(encoding="utf-8")) == {
        "template_name": "chatglm2",
        "system_message": "S",
        "roles": ["问", "答"],
        "messages": [["问", "你好"], ["答", "2:你好"]],
        "offset": 0,
    }
    talker, screen = talk([f"!!load {file}", "b", f"!!save {file}"], echo)
    assert screen.shown.startswith("问: 你好\n答: 2:你好\n问: b\n") or "问: 你好\n答: 2:你好\n" in screen.shown
    assert asked(talker) == [["S", "你好", "2:你好", "b"]]
    assert screen.notices == [f"saved as {file}.json, in place of an older one"]


def test_file_of_fastchat_is_loaded(talk, tmp_path):
    """Its roles are read as sides, whatever they are called there."""
    (tmp_path / "old.json").write_text(json.dumps(FASTCHAT_FILE), encoding="utf-8")
    talker, screen = talk([f"!!load {tmp_path / 'old'}", "b"], echo)
    assert asked(talker) == [["Be brief.", "你好", "你好！", "more", "no", "b"]]
    assert [message["role"] for message in talker.bodies[0]["messages"]][:3] == ["system", "user", "assistant"]
    assert screen.notices == ["it was saved as vicuna_v1.1 and goes on as chatglm2"]


def test_examples_in_front_are_neither_shown_nor_removed(talk, tmp_path):
    """`offset` of FastChat's few-shot templates."""
    (tmp_path / "x.json").write_text(json.dumps({**FASTCHAT_FILE, "offset": 2}), encoding="utf-8")
    talker, screen = talk([f"!!load {tmp_path / 'x'}", "!!remove", "!!remove", "b"], echo)
    assert asked(talker) == [["Be brief.", "你好", "你好！", "b"]]
    assert "你好！" not in screen.shown


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("not json", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "template_name is missing"),
        (json.dumps({**FASTCHAT_FILE, "roles": ["USER"]}), "roles must be two strings"),
        (json.dumps({**FASTCHAT_FILE, "messages": [["USER", 1]]}), r"messages\[0\]"),
        (json.dumps({**FASTCHAT_FILE, "messages": [["SYSTEM", "x"]]}), r"messages\[0\]"),
        (json.dumps({**FASTCHAT_FILE, "offset": 9}), "offset"),
        (None, "cannot be read"),
    ],
)
def test_bad_file_is_one_line_and_the_conversation_stays(talk, tmp_path, content, reason):
    """Also: a file that is no conversation is never written over."""
    file = tmp_path / "bad.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    talker, screen = talk(["a", f"!!load {file}", "b"], echo)
    assert asked(talker)[1] == ["a", "1:a", "b"]
    (notice,) = screen.notices
    assert re.search(reason, notice)
    assert "\n" not in notice
    assert str(file) in notice
    if content is not None:
        _, screen = talk(["a", f"!!save {file}"], echo)
        assert "not a saved conversation" in screen.notices[0]
        assert file.read_text(encoding="utf-8") == content


def test_file_commands_need_a_name_and_a_place(talk, tmp_path):
    _, screen = talk(["!!save", "!!load", f"!!save {tmp_path}/nowhere/x"], echo)
    assert screen.notices[:2] == ["give a file: !!save FILE", "give a file: !!load FILE"]
    assert "cannot be written" in screen.notices[2]


@pytest.mark.parametrize("name", ["~nobody-here/talk", ".", "/", "a" * 300, "a\0b"])
@pytest.mark.parametrize("command", ["!!save", "!!load"])
def test_name_that_no_file_can_have_is_one_line(talk, command, name):
    """The session, and what was said in it, goes on."""
    talker, screen = talk(["a", f"{command} {name}", "b"], echo)
    assert asked(talker)[1] == ["a", "1:a", "b"]
    (notice,) = screen.notices
    assert "\n" not in notice


def test_place_of_an_answer_that_never_came_is_left_out(tmp_path):
    """FastChat writes null there."""
    file = tmp_path / "x.json"
    file.write_text(json.dumps({**FASTCHAT_FILE, "messages": [["USER", "q"], ["ASSISTANT", None]]}), encoding="utf-8")
    assert [turn.text for turn in load_conversation(file).conversation.turns] == ["q"]


def test_debug_tells_prompt_and_speed(talk):
    usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 3}}
    _, screen = talk(["a"], lambda _: [event("x", finish="stop"), event(**usage)], is_debug=True)
    assert screen.notices[0] == "debug: prompt: 'a'"
    assert "prompt: 7 tokens" in screen.notices[1]
    assert "3 tokens" in screen.notices[1]
    assert "tokens/s" in screen.notices[1]


def test_model_is_chosen_by_number_or_name():
    """What is neither is asked again; nothing at all is the end."""
    screen = TypedScreen(["3", "x", "2", "a", ""])
    assert [choose_from(screen, "model", ["a", "b"]) for _ in range(2)] == ["b", "a"]
    with pytest.raises(EOFError):
        choose_from(screen, "model", ["a", "b"])


def test_control_characters_of_an_answer_do_not_steer_the_terminal():
    assert visible("a\x1b[2Jb\tc\n\x9b好") == "a\\x1b[2Jb\tc\n\\x9b好"
