"""Which chat format a model is served with. Torch-free; called by a worker, which logs the answer's `source`.

The order: `--conv-template`; the checkpoint's own chat template; what its other files say; the folder's name. Where
nothing fits, nothing is guessed: completions work, and a chat request is refused with the names to choose from,
since a wrong prompt gives wrong answers that look right.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import NoReturn

from fastchat.config import expand_home
from fastchat.errors import CheckpointError, ConfigError, InvalidRequestError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.format_spec import builtin_formats, read_format
from fastchat.models.interface import ChatFormat, ChatMessage, LengthCheck, any_length
from fastchat.models.jinja_format import JinjaFormat
from fastchat.models.prompt_format import PromptFormat
from fastchat.models.recognition import recognise
from fastchat.models.tokenizer import TemplateTokenizer

logger = logging.getLogger(__name__)

_LINE_FIRST = ("chatglm", "glm")
"""Families whose turns begin behind the role with a line for metadata, which the model writes itself in an answer."""
TEMPLATE_FOLDER = "additional_chat_templates"
"""Where transformers keeps the named templates beside chat_template.jinja."""


def load_chat_format(
    checkpoint: Checkpoint, tokenizer: TemplateTokenizer, conv_template: str | None = None
) -> ChatFormat:
    """The chat format of a checkpoint. `conv_template` is the name of a format or a path to a .json file of one.

    Raises `ConfigError` for a format that does not exist or does not suit the tokenizer, `CheckpointError` for a
    template that cannot be read.
    """
    if conv_template is not None:
        return _named_format(tokenizer, conv_template)
    template = _own_template(checkpoint)
    if template is not None:
        templates, source = template
        return JinjaFormat(
            templates,
            tokenizer,
            source=source,
            special_tokens=checkpoint.special_tokens,
            strips_leading_space=checkpoint.family.name in _LINE_FIRST or _leads_words_with_space(tokenizer),
        )
    recognised = recognise(checkpoint, lambda name: tokenizer.special_token_id(name) is not None)
    if recognised is None:
        logger.warning(
            "no chat format fits, so chat requests are refused; choose one with --conv-template model=%s formats=%s",
            checkpoint.name,
            ",".join(builtin_formats()),
        )
        return NoChatFormat(checkpoint.name)
    return PromptFormat(builtin_formats()[recognised.format_name], tokenizer, source=recognised.source)


class NoChatFormat:
    """Implements `interface.ChatFormat` for a model of which no format is known: every conversation is refused."""

    name = "none"
    source = "nothing in the checkpoint"
    roles = ("user", "assistant")
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    message_fields: frozenset[str] = frozenset()
    strips_leading_space = False

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name

    def render(
        self,
        messages: Sequence[ChatMessage],  # noqa: ARG002 - the interface's
        *,
        add_generation_prompt: bool = True,  # noqa: ARG002 - the interface's
        check_length: LengthCheck = any_length,  # noqa: ARG002 - the interface's
    ) -> NoReturn:
        raise InvalidRequestError(
            f"The model {self._model_name} has no chat format: use completions, or start its worker with "
            f"--conv-template and one of {', '.join(builtin_formats())}.",
            param="messages",
            code="no_chat_format",
        )


def _leads_words_with_space(tokenizer: TemplateTokenizer) -> bool:
    """Whether a text's first word is tokenized as if a space stood before it, as in Llama 2: answers begin so too."""
    return tokenizer.encode_piece("a") != tokenizer.encode_following("a")


def _named_format(tokenizer: TemplateTokenizer, conv_template: str) -> PromptFormat:
    if conv_template.endswith(".json"):
        return PromptFormat(read_format(expand_home(conv_template)), tokenizer, source=conv_template)
    spec = builtin_formats().get(conv_template)
    if spec is None:
        raise ConfigError(
            f"--conv-template {conv_template}: no such format; use one of {', '.join(builtin_formats())}, "
            "or a path to a .json file"
        )
    return PromptFormat(spec, tokenizer, source="--conv-template")


def _own_template(checkpoint: Checkpoint) -> tuple[Mapping[str, str], str] | None:
    """The checkpoint's templates by name, and the file they are in. A file of its own wins, as in transformers."""
    text = checkpoint.read_text("chat_template.jinja")
    if text is not None:
        for_tools = checkpoint.read_text(f"{TEMPLATE_FOLDER}/tool_use.jinja")
        return {"default": text} | ({"tool_use": for_tools} if for_tools else {}), "chat_template.jinja"
    source = "tokenizer_config.json"
    value = checkpoint.tokenizer_config.get("chat_template")
    if not value:
        return None
    if isinstance(value, str):
        return {"default": value}, source
    try:
        templates = {str(entry["name"]): str(entry["template"]) for entry in value}
    except (TypeError, KeyError):
        templates = {}
    if "default" not in templates:
        raise CheckpointError(f"{checkpoint.path / source}: chat_template has no template named default; correct it")
    return templates, source
