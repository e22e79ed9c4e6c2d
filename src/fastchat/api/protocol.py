"""The bodies that a client posts, as far as they are obeyed. Strict: no `"1"` for 1, no true for 1, no NaN. Torch-free.

What is known and *not* obeyed stands in `parameters.py`; `parse_body` there is the way from JSON to these classes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

MAX_CHOICES = 128
MAX_CHOICES_OF_ALL_PROMPTS = 256
MAX_PROMPTS = 64
MAX_EMBEDDING_INPUTS = 2048
MAX_MESSAGES = 2048
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_BIASED_TOKENS = 1024
MAX_TOP_LOGPROBS = 20
MAX_TOP_K = 1_000_000
_MAX_LABEL = 512
_INT64 = 2**63

Prompts = tuple[str, ...] | tuple[tuple[int, ...], ...]
"""Several prompts, all of them text or all of them token ids."""


def _stop_strings(value: object) -> object:
    """`stop` as a tuple: null, one string or a list of strings."""
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(item, str) for item in strings):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(strings) > MAX_STOP_STRINGS:
        raise PydanticCustomError("stop", f"may hold at most {MAX_STOP_STRINGS} strings")
    if not all(1 <= len(item) <= MAX_STOP_CHARACTERS for item in strings):
        raise PydanticCustomError("stop", f"strings must have 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(strings)


def _prompts(max_prompts: int) -> BeforeValidator:
    """A validator from string, list of strings, ids or list of ids to `Prompts`, none of them empty."""

    def convert(value: object) -> Prompts:
        is_one_list_of_ids = isinstance(value, list) and value and all(type(item) is int for item in value)
        if isinstance(value, str) or is_one_list_of_ids:
            value = [value]
        if not isinstance(value, list) or not value:
            raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids or lists of token ids")
        if len(value) > max_prompts:
            raise PydanticCustomError("prompt", f"may hold at most {max_prompts} entries")
        if not all(value):
            raise PydanticCustomError("prompt", "must not be empty, nor hold an empty entry")
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and all(type(token_id) is int for token_id in item) for item in value):
            return tuple(tuple(item) for item in value)
        raise PydanticCustomError("prompt", "must hold strings alone, or integer token ids alone")

    return BeforeValidator(convert)


def _text_content(value: object) -> object:
    """A message's content as one string: parts of text are joined by a new line, as other servers do."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string, a list of parts or null")
    texts: list[str] = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise PydanticCustomError("content", f"part {number} must be an object with a `type`")
        if kind != "text":
            raise PydanticCustomError("content", f"part {number} is `{kind[:64]}`; these models read text parts only")
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("content", f"part {number} must have its `text` as a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _list_as_tuple(value: object) -> object:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else value


def _stop_ids(value: object) -> object:
    """Counted before a million of them are looked at."""
    if isinstance(value, list) and len(value) > MAX_BIASED_TOKENS:
        raise PydanticCustomError("stop_token_ids", f"may hold at most {MAX_BIASED_TOKENS} token ids")
    return value


def _biases(value: object) -> object:
    """`logit_bias` as (token id, bias) pairs. JSON keys are strings; they must be plain decimal numbers."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise PydanticCustomError("logit_bias", "must be an object of token ids and numbers")
    if len(value) > MAX_BIASED_TOKENS:
        raise PydanticCustomError("logit_bias", f"may hold at most {MAX_BIASED_TOKENS} token ids")
    for key, bias in value.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and key == str(int(key))):
            raise PydanticCustomError("logit_bias", f"keys must be token ids, not `{key[:32]}`")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:  # NaN fails too
            raise PydanticCustomError("logit_bias", "values must be numbers between -100 and 100")
    return tuple((int(key), float(bias)) for key, bias in value.items())


Label = Annotated[str, Field(max_length=_MAX_LABEL)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
StopStrings = Annotated[tuple[str, ...], BeforeValidator(_stop_strings)]
TokenIds = Annotated[tuple[Count, ...], BeforeValidator(_list_as_tuple)]
Biases = Annotated[tuple[tuple[int, float], ...], BeforeValidator(_biases)]


class Body(BaseModel):
    """Base of all bodies. Fields that are not declared stay in `model_extra`; `parameters.py` judges them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(Body):
    """How a stream ends and what its chunks hold."""

    include_usage: bool | None = None


class Message(Body):
    """One message as the client sent it. `metadata` and `tools` are ChatGLM3's own."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function", "observation"]
    content: Annotated[str | None, BeforeValidator(_text_content)] = None
    name: Label | None = None
    metadata: Label | None = None
    tools: list[dict[str, Any]] | None = None  # Any: JSON as the client sent it
    tool_call_id: Label | None = None


class ModelBody(Body):
    """What every body has: the model's name and labels that change nothing."""

    model: Annotated[str, Field(min_length=1, max_length=_MAX_LABEL)]
    user: Label | None = None


class GenerationBody(ModelBody):
    """What both completion routes share. None means the default of checkpoint or server."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOP_K)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Biases = ()
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: StopStrings = ()
    stop_token_ids: Annotated[TokenIds, BeforeValidator(_stop_ids)] = ()
    ignore_eos: bool | None = None
    min_tokens: Count | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    metadata: Annotated[dict[Label, Label], Field(max_length=16)] | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @property
    def num_choices(self) -> int:
        """Answers for each prompt."""
        return self.n or 1

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletionRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(GenerationBody):
    """POST /v1/completions."""

    prompt: Annotated[Prompts, _prompts(MAX_PROMPTS)]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None


class EmbeddingRequest(ModelBody):
    """POST /v1/embeddings."""

    input: Annotated[Prompts, _prompts(MAX_EMBEDDING_INPUTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=2**20)] | None = None


class TokenizeRequest(ModelBody):
    """POST /tokenize: a prompt or a conversation."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None


class DetokenizeRequest(ModelBody):
    """POST /detokenize."""

    tokens: TokenIds


class AdapterRequest(BaseModel):
    """POST /api/v1/models/{base}/adapters. `path` is a folder below the worker's --adapter-dir, else `name` is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Annotated[str, Field(min_length=1, max_length=200)]
    path: Annotated[str, Field(min_length=1, max_length=4096)] | None = None


class ResumeState(BaseModel):
    """The `resume` field of our API server, one entry for each choice; null prompt ids: nothing was sent of it.

    `ended_choices` are the indices of those whose end was sent.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt_token_ids: tuple[tuple[Count, ...] | None, ...]
    emitted_token_ids: tuple[tuple[Count, ...], ...]
    ended_choices: tuple[Count, ...] = ()
