"""What is read from a request before it is relayed: its bytes, the model's name, whether it streams. Little else.

Everything that is about the answer itself is judged by the worker, which knows the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request

from fastchat.api.http_edge import parse_off_the_loop, read_body
from fastchat.errors import InvalidRequestError

_BYTES_PER_TOKEN = 4
_DEFAULT_ANSWER_TOKENS = 256
_MAX_ANSWER_TOKENS = 1 << 20
_MAX_MODEL_CHARACTERS = 512
_CHAT_PATH = "/v1/chat/completions"
_STREAMED_PATHS = frozenset({_CHAT_PATH, "/v1/completions"})
"""Elsewhere `stream` means nothing."""


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request that may be relayed. `num_tokens` is a rough guess of its work, for choosing a worker.

    `is_resume`: the body is the resume form, written by us.
    """

    path: str
    body: bytes
    model: str
    is_stream: bool
    num_tokens: int
    is_resume: bool = False


async def admit(request: Request, path: str, *, default_model: str | None = None) -> AdmittedRequest:
    """Read a request that is to be relayed to `path` of a worker; `default_model` is meant where it names none.

    The body's bytes go out as they came in. Only where the model's name is not in them (it stands in the URL, or may
    be left out since one model is served) they are written anew with it.
    """
    body = await read_body(request)
    document = await parse_off_the_loop(body)
    model = _named_model(document, request.path_params.get("model")) or default_model
    if model is None:
        raise InvalidRequestError("The request names no model; send `model`.", param="model", code="missing_model")
    if document.get("model") != model:
        body = orjson.dumps({**document, "model": model})
    is_stream = document.get("stream") is True and path in _STREAMED_PATHS
    return AdmittedRequest(path, body, model, is_stream, _num_tokens(document, len(body)))


def admit_chat(document: dict[str, Any]) -> AdmittedRequest:  # Any: JSON
    """A streamed chat completion that this process asks for itself; `document` names its model."""
    body = orjson.dumps(document)
    return AdmittedRequest(_CHAT_PATH, body, document["model"], True, _num_tokens(document, len(body)))


def _named_model(document: dict[str, Any], in_path: str | None) -> str | None:
    model = document.get("model")
    if model is not None and not (isinstance(model, str) and model):
        raise InvalidRequestError("`model` must be a non-empty string.", param="model")
    if model is not None and len(model) > _MAX_MODEL_CHARACTERS:
        raise InvalidRequestError(f"`model` is longer than {_MAX_MODEL_CHARACTERS} characters.", param="model")
    if in_path is not None and model not in (None, in_path):
        raise InvalidRequestError(
            f"The URL names the model `{in_path}` and the body `{model}`; send one of them.", param="model"
        )
    return in_path if model is None else model


def _num_tokens(document: dict[str, Any], num_bytes: int) -> int:
    """A guess without a tokenizer: the body's bytes and what the answer may have, for each choice."""
    limits = (document.get(name) for name in ("max_completion_tokens", "max_tokens"))
    limit = next((limit for limit in limits if type(limit) is int), _DEFAULT_ANSWER_TOKENS)
    choices = document.get("n")
    num_choices = choices if type(choices) is int else 1
    num_answer_tokens = min(max(limit, 1), _MAX_ANSWER_TOKENS) * min(max(num_choices, 1), 128)
    return num_bytes // _BYTES_PER_TOKEN + num_answer_tokens
