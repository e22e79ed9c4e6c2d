"""What a client posts to the arena, checked: which models, blind or not, each side's conversation, shared parameters.

Parameters are judged here once, as the workers of this project judge them, so that a wrong value is one plain 400 and
not an error of each side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fastchat.api.parameters import Ignored, parse_body, validate
from fastchat.api.protocol import ChatCompletionRequest
from fastchat.errors import InvalidRequestError

LABELS = "abcd"
"""Names of the sides, in their order."""
MAX_SIDES = len(LABELS)
NUM_BLIND_SIDES = 2
_OWN_FIELDS = frozenset({"models", "blind", "messages", "side_messages", "vote_token", "retry"})
_TELLTALE = ("logprobs", "top_logprobs", "return_token_ids", "stream_options", "logit_bias", "stop_token_ids")
"""Parameters whose effect tells the tokenizer, and with it the model."""

Json = dict[str, Any]  # Any: JSON has any value
Name = Annotated[str, Field(min_length=1, max_length=512)]
Messages = list[dict[str, Any]]  # judged by `ChatCompletionRequest`


class _ArenaBody(BaseModel):
    """Base: own fields are strict; all others are the chat completion's parameters, shared by the sides."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    messages: Messages | None = None
    side_messages: dict[str, Messages] | None = None


class ArenaRoundRequest(_ArenaBody):
    """POST /api/v1/arena/rounds. All other fields are those of a chat completion, shared by the sides.

    `models` alone: these, side by side, in this order. `blind`: two of them, or of all served, drawn and shuffled.
    `messages` is the conversation of all sides; `side_messages` gives each side its own, `{"a": [...], "b": [...]}`.
    """

    models: Annotated[list[Name], Field(min_length=2)] | None = None
    blind: bool | None = None


class ArenaTurnRequest(_ArenaBody):
    """POST /api/v1/arena/rounds/{round_id}/turns: the next turn, or with `retry` the last one again."""

    vote_token: Annotated[str, Field(max_length=128)]
    retry: bool | None = None


class ArenaVoteRequest(BaseModel):
    """POST /api/v1/arena/rounds/{round_id}/vote, once, when both sides have finished."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    vote: Literal["a", "b", "tie", "both_bad"]
    vote_token: Annotated[str, Field(max_length=128)]


class FeedbackRequest(BaseModel):
    """POST /api/v1/feedback: what somebody thinks of one answer of a chat. `id` is the answer's own."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,128}$")]
    model: Name
    vote: Literal["up", "down", "flag"]


@dataclass(frozen=True, slots=True)
class AskedTurn:
    """One turn as it will be asked: parameters for all sides, a conversation for each."""

    parameters: Json
    conversations: tuple[Messages, ...]
    ignored: Ignored

    def document(self, side: int, model: str) -> Json:
        """The chat completion of one side."""
        return {**self.parameters, "model": model, "messages": self.conversations[side], "stream": True}

    def user_texts(self) -> list[str]:
        """What the user wrote, for telling the language."""
        return [
            text
            for message in self.conversations[0]
            if message.get("role") == "user"
            for text in _texts(message.get("content"))
        ]


def parse_round(document: Json) -> tuple[ArenaRoundRequest, bool]:
    """A round to begin, and whether it is blind. Raises `InvalidRequestError`."""
    body = validate(ArenaRoundRequest, document)
    is_blind = body.models is None if body.blind is None else body.blind
    if body.models is None and not is_blind:
        raise _invalid("models", "is needed where blind is false: name two to four models")
    models = body.models or []
    if len(set(models)) < len(models):
        raise _invalid("models", "names a model twice; name different ones")
    if len(models) > MAX_SIDES and not is_blind:
        raise _invalid("models", f"may name at most {MAX_SIDES} models")
    for name in ("vote_token", "retry"):
        if document.get(name) is not None:
            raise _invalid(name, "belongs to /api/v1/arena/rounds/{round_id}/turns, not to a new round")
    return body, is_blind


def parse_turn(document: Json) -> ArenaTurnRequest:
    """A further turn of a round. Raises `InvalidRequestError`."""
    for name in ("models", "blind"):
        if document.get(name) is not None:
            raise _invalid(name, "is fixed by the round; begin a new one to change it")
    return validate(ArenaTurnRequest, document)


def asked_turn(document: Json, *, num_sides: int, is_blind: bool) -> AskedTurn:
    """The conversations and parameters of a round's or turn's body. Raises `InvalidRequestError`."""
    if document.get("stream") is False:
        raise _invalid("stream", "must be left out or true: a round is always streamed")
    if document.get("n") not in (None, 1):
        raise _invalid("n", "must be left out or 1: each side gives one answer")
    if document.get("model") is not None:
        raise _invalid("model", "is not a field of a round; send models")
    parameters = {name: value for name, value in document.items() if name not in _OWN_FIELDS}
    if is_blind:
        for name in _TELLTALE:
            if parameters.get(name):
                raise _invalid(name, "is not allowed in a blind round: it would tell the models apart")
    conversations = _conversations(document, num_sides)
    ignored = Ignored()
    for messages in conversations[:1] if document.get("messages") is not None else conversations:
        whole = {**parameters, "model": "-", "messages": messages, "stream": True}
        ignored = ignored.also(parse_body(ChatCompletionRequest, whole)[1].names)
    return AskedTurn(parameters, conversations, ignored)


def _conversations(document: Json, num_sides: int) -> tuple[Messages, ...]:
    shared, of_sides = document.get("messages"), document.get("side_messages")
    if (shared is None) is (of_sides is None):
        raise _invalid("messages", "or side_messages must be sent, one of them")
    if of_sides is None:
        return (shared,) * num_sides if shared is not None else ()
    labels = LABELS[:num_sides]
    if sorted(of_sides) != list(labels):
        raise _invalid("side_messages", f"must have exactly the keys {', '.join(labels)}")
    return tuple(of_sides[label] for label in labels)


def _texts(content: object) -> Sequence[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _invalid(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {rule}.", param=param, code="invalid_value")
