"""A loaded model as the API sees it: names, text side and engine. Knows no process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fastchat import __version__
from fastchat.engine.client import EngineClient
from fastchat.errors import ConfigError, ModelNotFoundError
from fastchat.models.interface import ChatFormat, SamplingDefaults, Tokenizer

SYSTEM_FINGERPRINT = f"fastchat-{__version__}"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One engine with its tokenizer. `max_context` in tokens; `created` in seconds since 1970.

    `stream_interval` is how many tokens an event waits for. `default_seed` serves requests without a seed of their own.
    `truncates_embedding_input` cuts inputs that are too long, because the operator asked for it. `adapter` names one of
    the engine's, and `base_name` is then its base's; "" is the model itself.
    """

    names: tuple[str, ...]
    tokenizer: Tokenizer
    chat_format: ChatFormat
    engine: EngineClient
    max_context: int
    sampling_defaults: SamplingDefaults
    created: int
    stream_interval: int = 1
    default_seed: int | None = None
    truncates_embedding_input: bool = False
    adapter: str = ""
    base_name: str = ""

    @property
    def engine_name(self) -> str:
        """What its engine is called."""
        return self.base_name or self.names[0]


class ServedModels:
    """All models of one worker, found by any of their names. Raises `ConfigError` when a name is there twice."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models: dict[str, ServedModel] = {}
        for model in models:
            self.add(model)

    def __contains__(self, name: str) -> bool:
        return name in self._models

    def add(self, model: ServedModel) -> None:
        """Serve one more. Raises `ConfigError` when a name is taken."""
        for name in model.names:
            if name in self._models:
                raise ConfigError(f"Two models are named {name!r}; give each its own with --model-names.")
            self._models[name] = model

    def remove(self, model: ServedModel) -> None:
        """Serve it no more; requests that have found it go on."""
        for name in model.names:
            del self._models[name]

    def __iter__(self) -> Iterator[tuple[str, ServedModel]]:
        """Every name with its model, in the order given."""
        return iter(self._models.items())

    def find(self, name: str) -> ServedModel:
        """The model of that name. Raises `ModelNotFoundError`."""
        try:
            return self._models[name]
        except KeyError:
            raise ModelNotFoundError(name, list(self._models)) from None
