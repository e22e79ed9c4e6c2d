"""Conversations, and the chat formats of checkpoints that tests wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.format_spec import builtin_formats
from fastchat.models.interface import ChatFormat, ChatMessage
from fastchat.models.prompt_format import PromptFormat
from fastchat.models.tokenizer import TemplateTokenizer, load_tokenizer


def user(content: str) -> ChatMessage:
    return ChatMessage("user", content)


def assistant(content: str) -> ChatMessage:
    return ChatMessage("assistant", content)


def system(content: str, **fields: Any) -> ChatMessage:
    return ChatMessage("system", content, **fields)


def format_of(folder: Path, conv_template: str | None = None) -> tuple[ChatFormat, TemplateTokenizer]:
    checkpoint = Checkpoint.open(folder)
    tokenizer = load_tokenizer(checkpoint)
    return load_chat_format(checkpoint, tokenizer, conv_template), tokenizer


def prompt_text(name: str, tokenizer: TemplateTokenizer, messages: Sequence[ChatMessage], **options: Any) -> str:
    """The prompt in a format, special tokens by name. A SentencePiece tokenizer adds a space after each of them."""
    chat_format = PromptFormat(builtin_formats()[name], tokenizer, source="a test")
    return tokenizer.decode(chat_format.render(messages, **options), skip_special_tokens=False)


CONVERSATION = (user("你好"), assistant("hello"), user("who?"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
