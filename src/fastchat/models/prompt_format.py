"""A conversation as a prompt by a format of `formats/`. Torch-free.

The prompt is built from token ids and pieces of text: a special token is an id from the start, and text, a user's
above all, is tokenized as text, so a role marker that a user types never becomes a role.

Rules for conversations that are out of the ordinary:

- Messages are written in their order; rounds count user messages, so two of them in a row are two rounds.
- Empty content is written as such.
- A conversation that ends with the assistant's message leaves it open when no generation prompt is asked for (the model
  continues it); otherwise a new answer is opened after it.
- Of a message's other fields only `metadata` is written, where a format's pieces have it (`message_fields` says so).
- `developer` is `system`; `tool` and `function` are `observation`. A role that a format cannot express is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastchat.errors import ConfigError, InvalidRequestError
from fastchat.models.control_tokens import PlainText
from fastchat.models.format_spec import FormatSpec, Piece, TextPiece, TokenPiece
from fastchat.models.interface import ChatMessage, LengthCheck, any_length
from fastchat.models.tokenizer import TemplateTokenizer

ROLE_ALIASES: Mapping[str, str] = {"developer": "system", "tool": "observation", "function": "observation"}


class PromptFormat:
    """Implements `interface.ChatFormat` for one tokenizer; immutable."""

    def __init__(self, spec: FormatSpec, tokenizer: TemplateTokenizer, *, source: str) -> None:
        self._spec = spec
        self._source = source
        self._token_ids = {name: _required_id(tokenizer, name, spec) for name in spec.token_names}
        self._text = PlainText(tokenizer, self._token_ids)

    @property
    def name(self) -> str:
        return self._spec.name

    @property
    def source(self) -> str:
        return self._source

    @property
    def roles(self) -> tuple[str, str]:
        return self._spec.roles

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return self._spec.stop_strings

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return frozenset(self._token_ids[name] for name in self._spec.stop_tokens)

    @property
    def message_fields(self) -> frozenset[str]:
        return self._spec.fields & {"metadata"}

    @property
    def strips_leading_space(self) -> bool:
        return self._spec.strips_leading_space

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        check_length: LengthCheck = any_length,
    ) -> list[int]:
        if not messages:
            raise InvalidRequestError("messages must not be empty.", param="messages", code="invalid_value")
        prompt = _Prompt(self._text, self._token_ids, has_prefix=self._spec.has_prefix)
        waiting_system = self._write_messages(prompt, self._with_default_system(messages))
        if waiting_system:
            raise _refusal(f"The chat format {self.name} needs a user message after a system message.")
        if add_generation_prompt:
            if _role_of(messages[-1]) == "assistant":
                prompt.add(self._spec.assistant_end)
            prompt.add(self._spec.generation)
        check_length(prompt.num_characters)
        return prompt.token_ids()

    def _with_default_system(self, messages: Sequence[ChatMessage]) -> Sequence[ChatMessage]:
        if self._spec.default_system is None or _role_of(messages[0]) == "system":
            return messages
        return [ChatMessage("system", self._spec.default_system), *messages]

    def _write_messages(self, prompt: _Prompt, messages: Sequence[ChatMessage]) -> list[str]:
        """Write every message. Returns the system texts that wait for a user message, for `system_in_user`."""
        waiting_system: list[str] = []
        num_rounds = self._spec.first_round
        for index, message in enumerate(messages):
            role = _role_of(message)
            if index and _role_of(messages[index - 1]) == "assistant":
                prompt.add(self._spec.assistant_end)
            values = {"content": message.content, "metadata": message.metadata, "round": str(num_rounds), "system": ""}
            if role == "system":
                values["content"] = self._system_text(message)
                if self._spec.system_in_user is not None:
                    waiting_system.append(values["content"])
                    continue
            elif message.tools:
                raise _refusal(f"Tools belong to a system message, not to a message of role {message.role}.")
            if role == "user":
                num_rounds += 1
                if waiting_system and self._spec.system_in_user is not None:
                    values["system"] = "\n".join(waiting_system)
                    values["content"] = self._spec.system_in_user.fill(values)
                    waiting_system = []
            prompt.add(self._pieces_of(role, message.role), values)
        return waiting_system

    def _system_text(self, message: ChatMessage) -> str:
        if not message.tools:
            return message.content
        if not self._spec.tools_in_system:
            raise _refusal(f"The chat format {self.name} has no tools.")
        # ChatGLM3 was trained on bare functions, OpenAI's clients send them in an envelope.
        functions = [tool.get("function", tool) if tool.get("type") == "function" else tool for tool in message.tools]
        return message.content + "\n" + json.dumps(functions, indent=4, ensure_ascii=False)

    def _pieces_of(self, role: str, asked: str) -> Sequence[Piece]:
        groups: Mapping[str, Sequence[Piece] | None] = {
            "user": self._spec.user,
            "assistant": self._spec.assistant,
            "system": self._spec.system,
            "observation": self._spec.observation,
        }
        pieces = groups.get(role)
        if pieces is None:
            known = ", ".join(name for name, group in groups.items() if group is not None)
            raise _refusal(f"The chat format {self.name} has no role {asked!r}; roles: {known}.")
        return pieces


class _Prompt:
    """Token ids and text in the making. Text is joined with its neighbours until a token or a piece that is alone."""

    def __init__(self, plain_text: PlainText, ids_by_name: Mapping[str, int], *, has_prefix: bool) -> None:
        self._plain_text = plain_text
        self._ids_by_name = ids_by_name
        self._parts: list[list[int] | str] = [plain_text.tokenizer.prefix_ids()] if has_prefix else []
        self._text: list[str] = []

    def add(self, pieces: Sequence[Piece], values: Mapping[str, str] | None = None) -> None:
        for piece in pieces:
            if isinstance(piece, TokenPiece):
                self._close_text()
                self._parts.append([self._ids_by_name[piece.name]])
            else:
                self._add_text(piece, values or _NO_VALUES)

    @property
    def num_characters(self) -> int:
        """Of all text so far."""
        return sum(map(len, self._text)) + sum(len(part) for part in self._parts if isinstance(part, str))

    def token_ids(self) -> list[int]:
        self._close_text()
        token_ids: list[int] = []
        for part in self._parts:
            token_ids += self._plain_text.encode(part) if isinstance(part, str) else part
        return token_ids

    def _add_text(self, piece: TextPiece, values: Mapping[str, str]) -> None:
        if piece.is_alone:
            self._close_text()
        self._text.append(piece.fill(values))
        if piece.is_alone:
            self._close_text()

    def _close_text(self) -> None:
        text = "".join(self._text)
        self._text = []
        if text:
            self._parts.append(text)


_NO_VALUES: Mapping[str, Any] = {"content": "", "metadata": "", "round": "", "system": ""}


def _role_of(message: ChatMessage) -> str:
    return ROLE_ALIASES.get(message.role, message.role)


def _required_id(tokenizer: TemplateTokenizer, name: str, spec: FormatSpec) -> int:
    token_id = tokenizer.special_token_id(name)
    if token_id is None:
        raise ConfigError(
            f"the chat format {spec.name} needs the token {name}, which this checkpoint's tokenizer lacks; "
            "choose another with --conv-template"
        )
    return token_id


def _refusal(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="messages", code="invalid_value")
