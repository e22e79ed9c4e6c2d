"""The checkpoint's own chat template (Jinja), rendered in a sandbox as transformers does. Torch-free.

What a template sees and how it is compiled follow huggingface/transformers utils/chat_template_utils.py, so that the
ids are those of its `apply_chat_template`. What users type never becomes a special token, see `control_tokens.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from fastchat.errors import CheckpointError, InvalidRequestError
from fastchat.models.control_tokens import ControlTokens, choose_marks
from fastchat.models.interface import ChatMessage, LengthCheck, any_length
from fastchat.models.template_sandbox import MAX_TEMPLATE_CHARACTERS, TemplateSandbox
from fastchat.models.tokenizer import TemplateTokenizer

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|user|>", "<|observation|>")
"""Special tokens that end a turn where a template writes them, though some checkpoints do not list them as ends."""

ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")
"""Templates build names of tokens from roles (`'<|' + role + '|>'`), so a role must not bring its own punctuation."""


class JinjaFormat:
    """Implements `interface.ChatFormat`. `templates` has `default`, and may have `tool_use` for requests with tools."""

    def __init__(
        self,
        templates: Mapping[str, str],
        tokenizer: TemplateTokenizer,
        *,
        source: str,
        special_tokens: Mapping[str, str],
        strips_leading_space: bool = False,
    ) -> None:
        self._environment = environment = _make_environment()
        if any(len(text) > MAX_TEMPLATE_CHARACTERS for text in templates.values()):
            raise CheckpointError(f"{source}: the chat template is longer than {MAX_TEMPLATE_CHARACTERS} characters")
        try:
            self._templates = {name: environment.from_string(text) for name, text in templates.items()}
            literals = "\0".join(_literals_of(environment, text) for text in templates.values())
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{source}: the chat template is not valid ({error}); correct it") from error
        self._tokenizer = tokenizer
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._strips_leading_space = strips_leading_space
        self._message_fields = frozenset().union(*(_fields_read(environment, text) for text in templates.values()))
        self._knows_developer = "developer" in literals
        soft_ids = {
            name: token_id
            for name, token_id in tokenizer.added_tokens.items()
            if name in literals and not name.isspace()
        }
        self._controls = ControlTokens(tokenizer, soft_ids)
        self._stop_token_ids = frozenset(
            tokenizer.special_tokens[name]
            for name in TURN_ENDS
            if name in tokenizer.special_tokens and _writes(literals, name)
        )

    @property
    def name(self) -> str:
        return "jinja"

    @property
    def source(self) -> str:
        return self._source

    @property
    def roles(self) -> tuple[str, str]:
        return ("user", "assistant")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return ()

    @property
    def stop_token_ids(self) -> frozenset[int]:
        return self._stop_token_ids

    @property
    def message_fields(self) -> frozenset[str]:
        return self._message_fields

    @property
    def strips_leading_space(self) -> bool:
        return self._strips_leading_space

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        check_length: LengthCheck = any_length,
    ) -> list[int]:
        if not messages:
            raise InvalidRequestError("messages must not be empty.", param="messages", code="invalid_value")
        turns = [self._turn(message) for message in messages]
        tools = [tool for message in messages for tool in message.tools]
        if not self._controls.occur_in([turns, tools]):
            text = self._render_text(turns, tools, add_generation_prompt)
            check_length(len(text))
            return self._tokenizer.encode_rendered(text)
        marks = choose_marks(turns, tools)
        # What the model wrote may hold `<think>` and its like as tokens: it was trained on them there.
        marked = [self._controls.mark(turn, marks, with_soft=turn["role"] != "assistant") for turn in turns]
        text = self._render_text(marked, self._controls.mark(tools, marks), add_generation_prompt)
        check_length(len(text) - sum(map(text.count, marks)))
        return self._controls.encode(text, marks)

    def _turn(self, message: ChatMessage) -> dict[str, Any]:  # Any: JSON
        """A message as a template sees it: keys without a value are left out, as transformers does."""
        if ROLE.fullmatch(message.role) is None:
            raise InvalidRequestError(
                f"The role {message.role!r} is not valid.", param="messages", code="invalid_value"
            )
        role = "system" if message.role == "developer" and not self._knows_developer else message.role
        turn = {key: value for key, value in message.fields.items() if value is not None}
        if message.metadata:
            turn["metadata"] = message.metadata
        if isinstance(turn.get("tool_calls"), list):
            turn["tool_calls"] = [_with_parsed_arguments(call) for call in turn["tool_calls"]]
        return {**turn, "role": role, "content": message.content}

    def _render_text(self, turns: list[Any], tools: list[Any], add_generation_prompt: bool) -> str:  # Any: JSON
        template = self._templates["default"]
        if tools:
            template = self._templates.get("tool_use", template)
        try:
            return self._environment.render_within_limits(
                template,
                **self._special_tokens,
                messages=turns,
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
            )
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            LookupError,
            ArithmeticError,
            AttributeError,
            RecursionError,
        ) as error:
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequestError(
                f"The model's chat template refuses these messages: {reason}", param="messages", code="invalid_value"
            ) from error


def _with_parsed_arguments(call: Any) -> Any:  # Any: JSON
    """OpenAI's clients send a call's arguments as a JSON string; templates expect the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _make_environment() -> TemplateSandbox:
    environment = TemplateSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _literals_of(environment: TemplateSandbox, template: str) -> str:
    """What the template itself writes or compares with: its text and its string constants."""
    tree = environment.parse(template)
    texts = [node.data for node in tree.find_all(nodes.TemplateData)]
    constants = [node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)]
    return "\0".join(texts + constants)


def _fields_read(environment: TemplateSandbox, template: str) -> set[str]:
    """The names that a template reads of a variable, as `message.name` or `message['name']`."""
    tree = environment.parse(template)
    read = {node.attr for node in tree.find_all(nodes.Getattr) if isinstance(node.node, nodes.Name)}
    keys = [node.arg for node in tree.find_all(nodes.Getitem) if isinstance(node.node, nodes.Name)]
    return read | {key.value for key in keys if isinstance(key, nodes.Const) and isinstance(key.value, str)}


def _writes(literals: str, token: str) -> bool:
    """Whether a template writes a token, whole or (`'<|' + role + '|>'`) around a role."""
    texts = literals.split("\0")
    builds_roles = any(text.endswith("<|") for text in texts) and any(text.startswith("|>") for text in texts)
    return token in literals or builds_roles


def _to_json(
    value: Any,  # Any: JSON
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    """The local date, which some templates put into the system message."""
    return datetime.now().astimezone().strftime(form)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's part for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the attribute's type is jinja2's

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()
