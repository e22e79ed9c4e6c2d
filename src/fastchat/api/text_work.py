"""Text work that may take long goes to a thread, so that it holds up nobody else's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from fastchat.api.protocol import Message
from fastchat.api.served_model import ServedModel
from fastchat.errors import InvalidRequestError
from fastchat.models.interface import ChatMessage

T = TypeVar("T")

_LONG_TEXT = 2000
"""Characters; a tokenizer takes about a millisecond for so many, and a thread costs a tenth of that."""


async def off_the_loop(work: Callable[[], T], *, size: int) -> T:
    """The result of `work`, computed in a thread when `size` (characters or ids) is large."""
    return work() if size < _LONG_TEXT else await asyncio.to_thread(work)


async def encode(model: ServedModel, text: str, *, adds_prefix: bool = True) -> tuple[int, ...]:
    """Token ids of a plain prompt."""
    encode_text = model.tokenizer.encode if adds_prefix else model.tokenizer.encode_piece
    return tuple(await off_the_loop(lambda: encode_text(text), size=len(text)))


async def render(
    model: ServedModel, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
) -> tuple[int, ...]:
    """Prompt ids of a conversation. Raises `InvalidRequestError`."""
    size = sum(len(message.content) for message in messages)
    render_messages = model.chat_format.render
    work = off_the_loop(lambda: render_messages(messages, add_generation_prompt=add_generation_prompt), size=size)
    return tuple(await work)


def check_token_ids(model: ServedModel, token_ids: Sequence[int], *, param: str) -> tuple[int, ...]:
    """Ids that a client sent. Raises `InvalidRequestError` where one is outside the vocabulary."""
    vocab_size = model.engine.limits.vocab_size
    for token_id in (min(token_ids), max(token_ids)) if token_ids else ():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequestError(
                f"{param}: the token id {token_id} is not in [0, {vocab_size}).", param=param, code="invalid_value"
            )
    return tuple(token_ids)


def chat_messages(messages: Sequence[Message]) -> list[ChatMessage]:
    """Messages as templates know them: `developer` is `system`, and the old `function` is `tool`."""
    return [_chat_message(message) for message in messages]


def unread_fields(model: ServedModel, messages: Sequence[ChatMessage]) -> list[str]:
    """The fields that clients sent with messages and that the model's prompt format has no place for."""
    sent = [name for message in messages for name in (*message.fields, *(["metadata"] if message.metadata else []))]
    return [f"messages.{name}" for name in dict.fromkeys(sent) if name not in model.chat_format.message_fields]


_ROLES = {"developer": "system", "function": "tool"}
_TEMPLATE_FIELDS = ("name", "tool_call_id")


def _chat_message(message: Message) -> ChatMessage:
    fields = {name: getattr(message, name) for name in _TEMPLATE_FIELDS}
    return ChatMessage(
        role=_ROLES.get(message.role, message.role),
        content=message.content or "",
        metadata=message.metadata or "",
        tools=tuple(message.tools or ()),
        fields={name: value for name, value in fields.items() if value},
    )
