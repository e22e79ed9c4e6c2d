"""Conversations become prompts: which format a checkpoint is served with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastchat.errors import ConfigError, InvalidRequestError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.format_spec import builtin_formats
from fastchat.models.tokenizer import load_tokenizer
from tests.checkpoints import FamilyName, write_checkpoint
from tests.models.conversations import (
    edit_json,
    format_of,
    system,
    user,
)
from tests.models.test_tokenizer import converted_llama


def forget_names(folder: Path) -> None:
    edit_json(folder / "config.json", _name_or_path="/data/output/checkpoint-1000")
    edit_json(folder / "tokenizer_config.json", name_or_path="")


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3"])
def test_chatglm_is_recognised_by_the_name_it_was_published_under(tmp_path: Path, family: FamilyName) -> None:
    chat_format, _ = format_of(write_checkpoint(tmp_path / "renamed", family))
    assert chat_format.name == family
    assert chat_format.source == f"_name_or_path in config.json ({family}-6b)"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ('prompt += "[Round {}]\\n\\n问：{}\\n\\n答：{}\\n\\n".format(i + 1, old_query, response)', "chatglm2"),
        ('role_special_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]', "chatglm3"),
    ],
)
def test_the_text_of_its_own_tokenizer_file_is_the_strongest_sign(tmp_path: Path, text: str, name: str) -> None:
    """Stronger than a wrong published name; the file is read, never run."""
    folder = write_checkpoint(tmp_path / "model", "chatglm2" if name == "chatglm3" else "chatglm3")
    (folder / "tokenization_chatglm.py").write_text(f"raise SystemExit('run')\n{text}\n", encoding="utf-8")
    chat_format, _ = format_of(folder)
    assert (chat_format.name, chat_format.source) == (name, "tokenization_chatglm.py")


def test_the_folders_name_is_the_last_sign(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "ChatGLM3_6b-mine", "chatglm2")
    forget_names(folder)
    chat_format, _ = format_of(folder)
    assert (chat_format.name, chat_format.source) == ("chatglm3", "the folder's name (ChatGLM3_6b-mine)")


def test_without_any_sign_chat_is_refused_with_the_names_to_choose_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_checkpoint(tmp_path / "model", "chatglm2")
    forget_names(folder)
    chat_format, _ = format_of(folder)
    assert chat_format.name == "none"
    assert "no chat format fits" in caplog.text
    with pytest.raises(InvalidRequestError, match="--conv-template and one of chatglm, chatglm2") as caught:
        chat_format.render([user("hi")])
    assert caught.value.code == "no_chat_format"


@pytest.mark.parametrize("name", ["chatglm2", "chatglm3", "plain"])
def test_conv_template_overrides_all(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model", "chatglm2")
    forget_names(folder)
    chat_format, _ = format_of(folder, name)
    assert (chat_format.name, chat_format.source) == (name, "--conv-template")


def test_conv_template_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"name": "mine", "user": ["<{content}>"], "assistant": ["{content}"], "generation": []}))
    chat_format, tokenizer = format_of(write_checkpoint(tmp_path / "model", "llama"), str(file))
    assert chat_format.name == "mine"
    assert tokenizer.decode(chat_format.render([user("hi")])) == "<hi>"


def test_an_unknown_conv_template_lists_the_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"chatglm9: no such format; use one of chatglm, chatglm2"):
        format_of(write_checkpoint(tmp_path, "chatglm2"), "chatglm9")


def test_a_format_whose_tokens_are_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which this checkpoint's tokenizer lacks"):
        format_of(write_checkpoint(tmp_path, "chatglm2"), "chatml")


def test_the_checkpoints_own_template_comes_before_other_signs(tmp_path: Path) -> None:
    chat_format, tokenizer = format_of(write_checkpoint(tmp_path / "vicuna-7b-v1.5", "llama"))
    assert (chat_format.name, chat_format.source) == ("jinja", "tokenizer_config.json")
    assert chat_format.stop_token_ids == {tokenizer.special_token_id("<|im_end|>")}


def test_the_space_of_a_first_word_is_no_part_of_an_answer(tmp_path: Path) -> None:
    """With the checkpoint's own template as with the formats that come along for such models."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "llama"))
    assert not load_chat_format(checkpoint, load_tokenizer(checkpoint)).strips_leading_space
    sentencepiece = converted_llama()[0]
    assert load_chat_format(checkpoint, sentencepiece).strips_leading_space
    assert load_chat_format(checkpoint, sentencepiece, "plain").strips_leading_space


def test_the_line_break_that_glm_4_writes_behind_its_role_is_no_part_of_an_answer(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, "glm", chat_template="x"))
    assert load_chat_format(checkpoint, load_tokenizer(checkpoint)).strips_leading_space


def test_a_template_file_comes_before_the_tokenizer_config(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    chat_format, tokenizer = format_of(tmp_path)
    assert chat_format.source == "chat_template.jinja"
    assert tokenizer.decode(chat_format.render([user("hi")])) == "hi!"


def test_a_template_for_tools_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    """As transformers saves named templates."""
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "chat_template.jinja").write_text("plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools[0].name }}")
    chat_format, tokenizer = format_of(tmp_path)
    assert tokenizer.decode(chat_format.render([user("hi")])) == "plain"
    assert tokenizer.decode(chat_format.render([system("", tools=({"name": "add"},)), user("hi")])) == "add"


def test_named_templates_use_the_one_for_tools_where_there_are_tools(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    edit_json(tmp_path / "tokenizer_config.json", chat_template=templates)
    chat_format, tokenizer = format_of(tmp_path)
    assert tokenizer.decode(chat_format.render([user("hi")])) == "plain"
    assert tokenizer.decode(chat_format.render([system("", tools=({"name": "add"},)), user("hi")])) == "add"


def test_role_tokens_in_the_vocabulary_are_a_sign(tmp_path: Path) -> None:
    chat_format, _ = format_of(write_checkpoint(tmp_path / "model", "qwen2", chat_template=None))
    assert (chat_format.name, chat_format.source) == ("chatml", "the token <|im_start|> in its vocabulary")


@pytest.mark.parametrize(
    ("folder_name", "family", "name"),
    [
        ("vicuna-7b-v1.3", "llama", "vicuna_v1.1"),
        ("Llama-2-7b-chat-hf", "llama", "llama-2"),
        ("Mistral-7B-Instruct-v0.2", "mistral", "mistral"),
        ("Llama-2-7b-hf", "llama", "none"),
    ],
)
def test_well_known_names_are_recognised(tmp_path: Path, folder_name: str, family: FamilyName, name: str) -> None:
    folder = write_checkpoint(tmp_path / folder_name, family, chat_template=None)
    checkpoint = Checkpoint.open(folder)
    assert load_chat_format(checkpoint, converted_llama()[0]).name == name


def test_every_format_that_comes_along_is_recognisable_by_its_name() -> None:
    assert list(builtin_formats()) == sorted(builtin_formats())
    assert set(builtin_formats()) == {
        "chatglm", "chatglm2", "chatglm3", "chatml", "llama-2", "llama-3", "mistral", "plain", "vicuna_v1.1",
    }  # fmt: skip
