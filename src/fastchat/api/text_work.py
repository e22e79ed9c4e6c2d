"""From what a client sent to text and token ids, and back; what may take long is done off the event loop."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from fastchat.api.off_the_loop import off_the_loop
from fastchat.api.parameters import Ignored, parse_body
from fastchat.api.protocol import Message
from fastchat.api.served_model import ServedModel
from fastchat.errors import ContextLengthError, InvalidRequestError
from fastchat.models.detokenizer import Detokenizer
from fastchat.models.interface import ChatMessage, LengthCheck, any_length

Prompt = str | tuple[int, ...]
BodyT = TypeVar("BodyT", bound=BaseModel)


async def parsed(kind: type[BodyT], document: dict[str, Any]) -> tuple[BodyT, Ignored]:  # Any: JSON has any value
    """`parse_body`, in a thread where the body holds long lists."""
    size = sum(len(value) for value in document.values() if isinstance(value, list | dict))
    return await off_the_loop(lambda: parse_body(kind, document), size=size)


async def prompts_ids(model: ServedModel, prompts: Sequence[Prompt], *, param: str) -> list[tuple[int, ...]]:
    """The ids of all prompts of a request, those checked that the client sent itself."""

    def ids(prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(model.tokenizer.encode(prompt))
        return check_token_ids(model, prompt, param=param)

    return await off_the_loop(lambda: [ids(prompt) for prompt in prompts], size=sum(map(len, prompts)))


async def prompts_texts(model: ServedModel, prompts: Sequence[Prompt]) -> list[str]:
    """The texts of all prompts of a request; a character that ids begin and do not end comes with the answer."""

    def text(prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else Detokenizer(model.tokenizer).push(prompt)

    return await off_the_loop(lambda: [text(prompt) for prompt in prompts], size=sum(map(len, prompts)))


async def encode(model: ServedModel, text: str, *, adds_prefix: bool = True) -> tuple[int, ...]:
    """Token ids of a plain prompt."""
    encode_text = model.tokenizer.encode if adds_prefix else model.tokenizer.encode_piece
    return tuple(await off_the_loop(lambda: encode_text(text), size=len(text)))


async def render(
    model: ServedModel,
    messages: Sequence[ChatMessage],
    *,
    add_generation_prompt: bool = True,
    check_length: LengthCheck = any_length,
) -> tuple[int, ...]:
    """Prompt ids of a conversation. Raises `InvalidRequestError`, and what `check_length` raises before tokenizing."""
    size = sum(map(_size, messages))
    render_messages = model.chat_format.render

    def work() -> list[int]:
        return render_messages(messages, add_generation_prompt=add_generation_prompt, check_length=check_length)

    return tuple(await off_the_loop(work, size=size))


def length_check(model: ServedModel, *, param: str) -> LengthCheck:
    """Raises `ContextLengthError` for so many characters that no tokens of the context's number can hold them."""
    per_id = model.tokenizer.max_id_characters

    def check(num_characters: int) -> None:
        if per_id is not None and num_characters > per_id * model.max_context:
            raise ContextLengthError(
                num_prompt_tokens=-(-num_characters // per_id),
                max_tokens=None,
                max_context=model.max_context,
                param=param,
                is_at_least=True,
            )

    return check


def check_lengths(model: ServedModel, prompts: Sequence[Prompt], *, param: str) -> None:
    """`length_check` of every prompt that is text."""
    check = length_check(model, param=param)
    for prompt in prompts:
        if isinstance(prompt, str):
            check(len(prompt))


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


_MARKS_SIZE = 16
"""What stands around a message in a prompt, in characters."""
_ROLES = {"developer": "system", "function": "tool"}
_TEMPLATE_FIELDS = ("name", "tool_call_id")


def _size(message: ChatMessage) -> int:
    """About what a message costs to render, in characters. Tools are large without a look at what they hold."""
    if message.tools:
        return sys.maxsize
    return _MARKS_SIZE + len(message.content) + len(message.metadata) + sum(map(len, message.fields.values()))


def _chat_message(message: Message) -> ChatMessage:
    fields = {name: getattr(message, name) for name in _TEMPLATE_FIELDS}
    return ChatMessage(
        role=_ROLES.get(message.role, message.role),
        content=message.content or "",
        metadata=message.metadata or "",
        tools=tuple(message.tools or ()),
        fields={name: value for name, value in fields.items() if value},
    )
