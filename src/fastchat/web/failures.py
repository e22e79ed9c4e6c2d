"""Errors as people read them: each is a key of the texts and its facts."""

from __future__ import annotations

from dataclasses import dataclass, field

from fastchat.errors import AuthenticationError, FastChatError, ModelNotFoundError, RequestError, UnavailableError
from fastchat.web.translation import Language, translate

_KEYS_OF_CODES = {
    "context_length_exceeded": "error_context",
    "model_not_found": "error_model_gone",
    "no_worker": "error_no_worker",
    "no_controller": "error_no_worker",
    "no_api_server": "error_no_api",
    "worker_unreachable": "error_no_worker",
    "worker_lost": "error_worker_lost",
    "stream_lost": "error_worker_lost",
    "shutting_down": "error_worker_lost",
    "already_voted": "error_voted",
    "round_not_found": "error_round_gone",
    "arena_busy": "error_arena",
    "arena_unavailable": "error_arena",
    "turn_not_complete": "error_turn",
    "too_few_models": "error_few_models",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, in no language yet."""

    key: str
    facts: dict[str, str] = field(default_factory=dict)

    def text(self, language: Language) -> str:
        """The sentence that is shown."""
        return translate(language, self.key, **self.facts)


class BadInputError(FastChatError):
    """A value of the page that cannot be sent; `failure` says which."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text("en"))
        self.failure = failure


def failure_of(error: FastChatError, model: str) -> Failure:
    """What the API client raised, for people."""
    if isinstance(error, BadInputError):
        return error.failure
    if isinstance(error, AuthenticationError):
        return Failure("error_key")
    code = error.code if isinstance(error, RequestError | UnavailableError) else None
    key = "error_model_gone" if isinstance(error, ModelNotFoundError) else _KEYS_OF_CODES.get(code or "")
    if key is None:
        key = "error_refused" if isinstance(error, RequestError) else "error_other"
    return Failure(key, {"model": model, "detail": error.message})
