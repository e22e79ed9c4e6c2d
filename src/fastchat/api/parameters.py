"""From a JSON body to a request: what is not obeyed is refused by name, unless its value changes nothing.

Every name that a client of OpenAI's or vLLM's may send is in exactly one place: a field of `protocol.py` (obeyed, or a
label that changes nothing) or a line of the tables here (accepted with a neutral value only). Any other name is
accepted and reported in the header `x-fastchat-ignored`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fastchat.api.protocol import (
    MAX_CHOICES_OF_ALL_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerationBody,
    TokenizeRequest,
)
from fastchat.errors import InvalidRequestError

BodyT = TypeVar("BodyT", bound=BaseModel)
Json = Mapping[str, Any]  # Any: JSON has any value

MAX_IGNORED_NAMES = 32
_MAX_NAME = 64

_NO_TOOLS = "tools are not supported here yet"
_NO_GRAMMAR = "answers cannot be bound to a grammar here yet"
_TEXT_ONLY = "these models read and write text only"


@dataclass(frozen=True, slots=True)
class NeutralOnly:
    """A name that we know and do not obey. null is always neutral; `values` are the others."""

    reason: str
    values: tuple[Any, ...] = ()  # Any: JSON values


_BOTH: dict[str, NeutralOnly] = {
    "service_tier": NeutralOnly("there is one tier", ("auto", "default")),
    "prompt_cache_options": NeutralOnly("the prompt cache needs no options", ({},)),
    "prompt_cache_retention": NeutralOnly("prompts are cached in memory", ("in_memory", "in-memory")),
    "use_beam_search": NeutralOnly("there is no beam search", (False,)),
    "early_stopping": NeutralOnly("there is no beam search", (False,)),
    "length_penalty": NeutralOnly("there is no beam search", (1,)),
    "bad_words": NeutralOnly("use logit_bias", ([],)),
    "allowed_token_ids": NeutralOnly("use logit_bias"),
    "logits_processors": NeutralOnly("requests bring no code", ([],)),
    "spaces_between_special_tokens": NeutralOnly("text is decoded as the tokenizer does", (True,)),
    "truncate_prompt_tokens": NeutralOnly("a prompt is never cut"),
    "prompt_logprobs": NeutralOnly("use echo and logprobs of /v1/completions"),
    "guided_json": NeutralOnly(_NO_GRAMMAR),
    "guided_regex": NeutralOnly(_NO_GRAMMAR),
    "guided_choice": NeutralOnly(_NO_GRAMMAR),
    "guided_grammar": NeutralOnly(_NO_GRAMMAR),
    "guided_decoding_backend": NeutralOnly(_NO_GRAMMAR),
    "structured_outputs": NeutralOnly(_NO_GRAMMAR),
    "response_format": NeutralOnly(_NO_GRAMMAR, ({"type": "text"},)),
}

_CHAT = _BOTH | {
    "audio": NeutralOnly(_TEXT_ONLY),
    "modalities": NeutralOnly(_TEXT_ONLY, (["text"],)),
    "tools": NeutralOnly(_NO_TOOLS, ([],)),
    "tool_choice": NeutralOnly(_NO_TOOLS, ("none", "auto")),
    "functions": NeutralOnly(_NO_TOOLS, ([],)),
    "function_call": NeutralOnly(_NO_TOOLS, ("none", "auto")),
    "parallel_tool_calls": NeutralOnly(_NO_TOOLS, (True, False)),
    "moderation": NeutralOnly("there is no moderation"),
    "prediction": NeutralOnly("predicted outputs are not supported"),
    "reasoning_effort": NeutralOnly("these models have no reasoning levels", ("none",)),
    "store": NeutralOnly("answers are not stored", (False,)),
    "verbosity": NeutralOnly("these models have no verbosity levels", ("medium",)),
    "web_search_options": NeutralOnly("there is no web search"),
    "chat_template": NeutralOnly("requests bring no template; the checkpoint's own is used"),
    "chat_template_kwargs": NeutralOnly("the template takes no options from requests", ({},)),
    "documents": NeutralOnly("put documents into the messages", ([],)),
    "continue_final_message": NeutralOnly("use /v1/completions to continue a text", (False,)),
    "echo": NeutralOnly("use echo of /v1/completions", (False,)),
    "add_special_tokens": NeutralOnly("the template decides on special tokens", (False,)),
    "best_of": NeutralOnly("there is one answer for each choice", (1,)),
    "mm_processor_kwargs": NeutralOnly(_TEXT_ONLY, ({},)),
}

_STREAM_OPTIONS = {"include_obfuscation": NeutralOnly("chunks are not padded", (False,))}

_MESSAGE = {
    "tool_calls": NeutralOnly(_NO_TOOLS, ([],)),
    "function_call": NeutralOnly(_NO_TOOLS),
    "audio": NeutralOnly(_TEXT_ONLY),
}

_COMPLETIONS = _BOTH | {
    "suffix": NeutralOnly("these models do not fill in between", ("",)),
    "add_special_tokens": NeutralOnly("send token ids to choose them yourself", (True,)),
}

NEUTRAL_ONLY: Mapping[type[BaseModel], Mapping[str, NeutralOnly]] = {
    ChatCompletionRequest: _CHAT,
    CompletionRequest: _COMPLETIONS,
    EmbeddingRequest: {
        "truncate_prompt_tokens": _BOTH["truncate_prompt_tokens"],
        "add_special_tokens": _COMPLETIONS["add_special_tokens"],
    },
    TokenizeRequest: {
        name: _CHAT[name]
        for name in ("tools", "chat_template", "chat_template_kwargs", "continue_final_message", "mm_processor_kwargs")
    }
    | {"return_token_strs": NeutralOnly("only ids are returned", (False,))},
    DetokenizeRequest: {},
}


@dataclass(frozen=True, slots=True)
class Ignored:
    """The names of a body that are unknown here, or that this model's prompts have no place for."""

    names: tuple[str, ...] = ()

    def also(self, names: Iterable[str]) -> Ignored:
        """These names too."""
        return Ignored(tuple(dict.fromkeys((*self.names, *names))))

    def header_value(self) -> str | None:
        """The names for the header, shortened and made printable; None when there are none."""
        if not self.names:
            return None
        shown = [re.sub(r"[^A-Za-z0-9_.-]", "?", name[:_MAX_NAME]) for name in self.names[:MAX_IGNORED_NAMES]]
        more = len(self.names) - len(shown)
        return ", ".join([*shown, f"+{more} more"] if more else shown)


def parse_body(kind: type[BodyT], document: Json) -> tuple[BodyT, Ignored]:
    """A request from its JSON, and what in it is unknown. Raises `InvalidRequestError` naming the field."""
    body = validate(kind, document)
    unknown = dict.fromkeys(_unknown_names(body, NEUTRAL_ONLY.get(kind, {})))
    for number, message in enumerate(getattr(body, "messages", None) or ()):
        names = _unknown_names(message, _MESSAGE, prefix=f"messages[{number}].")
        unknown |= dict.fromkeys(f"messages.{name}" for name in names)
    if isinstance(body, GenerationBody):
        _check_generation(body)
        if body.stream_options is not None:
            names = _unknown_names(body.stream_options, _STREAM_OPTIONS, prefix="stream_options.")
            unknown |= dict.fromkeys(f"stream_options.{name}" for name in names)
    return body, Ignored(tuple(unknown))


def validate(kind: type[BodyT], document: Json, *, prefix: str = "") -> BodyT:
    """`kind` from JSON. Raises `InvalidRequestError` with the path of the first wrong field, without its value."""
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = prefix + field_path(first["loc"])
    if first["type"] == "missing":
        raise InvalidRequestError(f"{path} is required.", param=path, code="missing_required_parameter")
    message = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    verb = "must be " if message != first["msg"] else ""
    raise InvalidRequestError(f"{path}: {verb}{message}.", param=path, code="invalid_value")


def field_path(location: Iterable[str | int]) -> str:
    """A field as a client writes it: `messages[0].content`. Of a key that the client made up only the beginning."""
    path = ""
    for part in location:
        name = part[:_MAX_NAME] if isinstance(part, str) else f"[{part}]"
        path += f".{name}" if path and isinstance(part, str) else name
    return path


def _unknown_names(body: BaseModel, known: Mapping[str, NeutralOnly], *, prefix: str = "") -> list[str]:
    """The names in `body` that are unknown here and not null. Raises for one of `known` whose value is not neutral."""
    unknown: list[str] = []
    for name, value in (body.model_extra or {}).items():
        if name not in known:
            unknown += [name] if value is not None else []
        elif value is not None and not _is_among(value, known[name].values):
            raise _refused(prefix + name, known[name])
    return unknown


def _is_among(value: object, neutral: Sequence[object]) -> bool:
    """Equality that tells true from 1, which Python does not."""
    return any(value == item and isinstance(value, bool) is isinstance(item, bool) for item in neutral)


def _refused(name: str, rule: NeutralOnly) -> InvalidRequestError:
    values = [f"`{json.dumps(value)}`" for value in rule.values if value not in ({}, [], "")]
    accepted = f" Leave it out{' or send ' + ' or '.join(values) if values else ''}."
    return InvalidRequestError(
        f"{name} is not supported with this value: {rule.reason}.{accepted}", param=name, code="unsupported_parameter"
    )


def _check_generation(body: GenerationBody) -> None:
    """The rules between fields."""
    if body.stream_options is not None and not body.stream:
        raise _invalid("stream_options", "is allowed only with stream: true")
    if isinstance(body, ChatCompletionRequest):
        _check_chat(body)
    elif isinstance(body, CompletionRequest):
        _check_completion(body)


def _check_chat(body: ChatCompletionRequest) -> None:
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise _invalid("max_completion_tokens", "and max_tokens differ; send one of them")
    if 0 in limits:
        raise _invalid("max_tokens" if body.max_tokens == 0 else "max_completion_tokens", "must be at least 1")
    if body.top_logprobs and not body.logprobs:
        raise _invalid("top_logprobs", "is allowed only with logprobs: true")
    for number, message in enumerate(body.messages):
        if message.content is None and message.role != "assistant":
            raise _invalid(f"messages[{number}].content", "must not be null for this role")


def _check_completion(body: CompletionRequest) -> None:
    if body.best_of is not None and body.best_of != body.num_choices:
        raise _invalid("best_of", "is supported only when it equals n: there is one answer for each choice")
    if body.max_tokens == 0 and not body.echo:
        raise _invalid("max_tokens", "must be at least 1 (0 is allowed with echo: true)")
    if len(body.prompt) * body.num_choices > MAX_CHOICES_OF_ALL_PROMPTS:
        raise _invalid("n", f"times the number of prompts must be at most {MAX_CHOICES_OF_ALL_PROMPTS}")


def _invalid(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {rule}.", param=param, code="invalid_value")
