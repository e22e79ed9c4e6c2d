"""The one tree of errors. It knows no HTTP: `api/http_edge.py` maps each class to a status and OpenAI's body.

FastChatError
├── ConfigError                 a flag, environment variable or file that cannot be obeyed
│   └── ConfigFileError         what the configuration file or a FASTCHAT_* variable says, not the command line
├── CheckpointError             a folder that cannot be loaded as a model
│   └── UnsupportedModelError   a model whose architecture or option we do not run
├── RequestError                the client's fault; `param` and `code` go out in the body
│   ├── InvalidRequestError     a value out of range, an unknown choice, malformed JSON
│   │   └── ContextLengthError  prompt and answer do not fit the model's context
│   ├── BodyTooLargeError       more bytes than we read
│   ├── AuthenticationError     no key, or a wrong one
│   ├── PermissionDeniedError   a key or token that may not do this
│   ├── ModelNotFoundError      nobody serves that model
│   ├── RecordNotFoundError     nothing of that id is kept here for this client
│   ├── ConflictError           what was asked for does not fit the state of what it is about
│   └── RouteNotFoundError      no such path or method
├── UnavailableError            try again later: no worker, a worker lost, shutting down
└── EngineError                 our fault: a step failed, logits were not numbers
"""

from __future__ import annotations

from collections.abc import Sequence


class FastChatError(Exception):
    """Base of all errors raised on purpose; `message` is a sentence a user can act on."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(FastChatError):
    """A flag, environment variable or configuration file that cannot be obeyed."""


class ConfigFileError(ConfigError):
    """A configuration file, or a variable that stands for a flag, that cannot be obeyed; the message names it."""


class CheckpointError(FastChatError):
    """A folder that cannot be loaded as a model; the message names the file and what to do."""


class UnsupportedModelError(CheckpointError):
    """A model whose architecture, or an option of it, is not run here."""


class RequestError(FastChatError):
    """The client's fault. `param` names the field, `code` is stable for programs."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """A value that cannot be obeyed."""


class ContextLengthError(InvalidRequestError):
    """Prompt and requested answer do not fit the model's context. Counts are in tokens.

    `is_at_least`: the prompt was not tokenized, since its length alone shows that it has so many tokens or more.
    """

    def __init__(
        self,
        *,
        num_prompt_tokens: int,
        max_tokens: int | None,
        max_context: int,
        param: str = "messages",
        is_at_least: bool = False,
    ) -> None:
        if max_tokens is None:
            count = f"at least {num_prompt_tokens}" if is_at_least else f"{num_prompt_tokens}"
            asked = f"the prompt alone has {count} tokens and leaves no room for an answer"
            remedy = "shorten the prompt"
        else:
            asked = (
                f"{num_prompt_tokens + max_tokens} tokens were requested "
                f"({num_prompt_tokens} in the prompt, {max_tokens} for the answer)"
            )
            remedy = "shorten the prompt or lower max_tokens"
        super().__init__(
            f"This model's maximum context length is {max_context} tokens, but {asked}; {remedy}.",
            param=param,
            code="context_length_exceeded",
        )
        self.num_prompt_tokens = num_prompt_tokens
        self.max_tokens = max_tokens
        self.max_context = max_context


class BodyTooLargeError(RequestError):
    """The request has more bytes than the server reads."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The request body is larger than {max_bytes} bytes; send less.", code="body_too_large")
        self.max_bytes = max_bytes


class AuthenticationError(RequestError):
    """No key, or a key that is not known here."""

    def __init__(self, message: str, *, code: str = "invalid_api_key") -> None:
        super().__init__(message, code=code)


class PermissionDeniedError(RequestError):
    """A valid key or token that may not do this."""


class ModelNotFoundError(RequestError):
    """Nobody serves the model that was asked for."""

    def __init__(self, model: str, served: Sequence[str]) -> None:
        names = ", ".join(f"`{name}`" for name in served) if served else "none yet (no worker has registered)"
        super().__init__(
            f"The model `{model}` does not exist here. Models served: {names}.", param="model", code="model_not_found"
        )
        self.model = model
        self.served = tuple(served)


class RecordNotFoundError(RequestError):
    """Nothing of that id is kept here for this client."""


class ConflictError(RequestError):
    """Asked too early, or a second time."""


class RouteNotFoundError(RequestError):
    """No such path, or not with that method."""


class UnavailableError(FastChatError):
    """Not now: no worker answers, a worker was lost, the process is shutting down."""

    def __init__(self, message: str, *, retry_after_s: int = 1, code: str = "unavailable") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code


class EngineError(FastChatError):
    """Our fault while computing; the log has the cause."""
