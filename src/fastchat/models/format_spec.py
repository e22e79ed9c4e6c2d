"""Chat formats as data: what a file of `formats/` (or one that a user wrote) says, checked. Torch-free.

A file is a JSON object. A *piece* is `"text"`, `{"token": "<|user|>"}` (the id of a special token, never text), or
`{"piece": "text"}` (text that is tokenized by itself, not joined with its neighbours). Text may hold the fields
`{content}`, `{round}` (counts user turns), `{metadata}` and `{system}`.

    name, description     strings
    roles                 [user, assistant]: the labels that a terminal shows
    user, assistant       pieces of one message
    assistant_end         pieces after an assistant's message, written once something follows it
    generation            pieces that open the answer
    system                pieces of a system message; or
    system_in_user        text that puts {system} into the {content} of the next user message
    observation           pieces of a tool's result (roles `tool`, `function`, `observation`)
    default_system        the system message where a conversation has none
    tools_in_system       true: tools follow the system text as indented JSON
    first_round           the number of the first user turn (1)
    has_prefix            false: nothing in front, not even what the tokenizer puts there
    stop_strings, stop_tokens, strips_leading_space
    recognise             how a checkpoint shows that it wants this format, see `recognition.py`
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from fastchat.errors import ConfigError

FORMATS_FOLDER = Path(__file__).parent / "formats"
FIELD = re.compile(r"\{(content|round|metadata|system)\}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text with fields: `parts` are literals at even places and names of fields at odd ones."""

    parts: tuple[str, ...]
    is_alone: bool = False

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every field's value in its place; values are not looked into."""
        return "".join(values[part] if index % 2 else part for index, part in enumerate(self.parts))


@dataclass(frozen=True, slots=True)
class TokenPiece:
    """A special token by name."""

    name: str


Piece = TextPiece | TokenPiece


@dataclass(frozen=True, slots=True)
class Recognition:
    """The signs of a checkpoint that wants a format; empty ones are no sign."""

    families: tuple[str, ...] = ()
    """The families that may have the format at all; empty for any."""
    tokenizer_text: tuple[str, ...] = ()
    """Strings that all occur in the text of the checkpoint's own `tokenization_*.py`."""
    tokens: tuple[str, ...] = ()
    """Special tokens that the tokenizer has."""
    names: tuple[str, ...] = ()
    """Patterns of model names, for `_name_or_path` and for the folder's name; lower case, `-` for `_`."""


@dataclass(frozen=True, slots=True)
class FormatSpec:
    """One chat format, as its file says."""

    name: str
    user: tuple[Piece, ...]
    assistant: tuple[Piece, ...]
    generation: tuple[Piece, ...]
    roles: tuple[str, str] = ("user", "assistant")
    description: str = ""
    assistant_end: tuple[Piece, ...] = ()
    system: tuple[Piece, ...] | None = None
    system_in_user: TextPiece | None = None
    observation: tuple[Piece, ...] | None = None
    default_system: str | None = None
    tools_in_system: bool = False
    first_round: int = 1
    has_prefix: bool = True
    stop_strings: tuple[str, ...] = ()
    stop_tokens: tuple[str, ...] = ()
    strips_leading_space: bool = False
    recognise: Recognition = field(default_factory=Recognition)

    @property
    def token_names(self) -> frozenset[str]:
        """Every special token that the format needs."""
        return frozenset(piece.name for piece in self._pieces if isinstance(piece, TokenPiece)) | set(self.stop_tokens)

    @property
    def fields(self) -> frozenset[str]:
        """Every field that the format's pieces have."""
        return frozenset(part for piece in self._pieces if isinstance(piece, TextPiece) for part in piece.parts[1::2])

    @property
    def _pieces(self) -> list[Piece]:
        groups = (self.user, self.assistant, self.assistant_end, self.generation, self.system, self.observation)
        return [piece for group in groups for piece in group or ()]


@cache
def builtin_formats() -> Mapping[str, FormatSpec]:
    """The formats that come with the package, by name."""
    specs = [read_format(file) for file in sorted(FORMATS_FOLDER.glob("*.json"))]
    return {spec.name: spec for spec in specs}


def read_format(file: Path) -> FormatSpec:
    """One format file. Raises `ConfigError` that names the file, the key and what is expected there."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not a readable chat format ({error})") from None
    try:
        return parse_format(content)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error.message}") from None


def parse_format(content: Any) -> FormatSpec:  # Any: JSON
    """The format that a parsed JSON file describes. Raises `ConfigError`."""
    if not isinstance(content, dict):
        raise ConfigError("a chat format must be a JSON object")
    unknown = sorted(set(content) - set(_READERS))
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; known are {', '.join(_READERS)}")
    missing = [key for key in ("name", "user", "assistant", "generation") if key not in content]
    if missing:
        raise ConfigError(f"the key {missing[0]!r} is missing")
    values = {key: _READERS[key](content[key], key) for key in content}
    if values.get("system") is not None and values.get("system_in_user") is not None:
        raise ConfigError("has both 'system' and 'system_in_user'; a system message can be written in one way only")
    return FormatSpec(**values)


def _pieces(value: Any, key: str) -> tuple[Piece, ...]:  # Any: JSON, here and below
    if not isinstance(value, list):
        raise ConfigError(f"{key!r} must be a list of pieces")
    return tuple(_piece(item, key) for item in value)


def _piece(value: Any, key: str) -> Piece:
    if isinstance(value, str):
        return TextPiece(tuple(FIELD.split(value)))
    if isinstance(value, dict) and len(value) == 1:
        kind, text = next(iter(value.items()))
        if kind == "token" and isinstance(text, str) and text:
            return TokenPiece(text)
        if kind == "piece" and isinstance(text, str):
            return TextPiece(tuple(FIELD.split(text)), is_alone=True)
    raise ConfigError(f'{key!r} has {value!r}; a piece is "text", {{"token": "name"}} or {{"piece": "text"}}')


def _system_in_user(value: Any, key: str) -> TextPiece:
    piece = TextPiece(tuple(FIELD.split(_string(value, key))))
    if not {"system", "content"} <= set(piece.parts[1::2]):
        raise ConfigError(f"{key!r} must hold {{system}} and {{content}}")
    return piece


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{key!r} must be a string")
    return value


def _name(value: Any, key: str) -> str:
    if not _string(value, key):
        raise ConfigError(f"{key!r} must not be empty")
    return str(value)


def _strings(value: Any, key: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ConfigError(f"{key!r} must be a list of strings that are not empty")
    return tuple(value)


def _roles(value: Any, key: str) -> tuple[str, str]:
    names = _strings(value, key)
    if len(names) != 2:
        raise ConfigError(f"{key!r} must be two labels: the user's and the assistant's")
    return names[0], names[1]


def _boolean(value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(f"{key!r} must be true or false")
    return value


def _count(value: Any, key: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{key!r} must be a whole number, 0 or more")
    return value


def _patterns(value: Any, key: str) -> tuple[str, ...]:
    for pattern in _strings(value, key):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"{key!r} has {pattern!r}, which is not a pattern ({error})") from None
    return tuple(value)


def _recognition(value: Any, key: str) -> Recognition:
    readers = {"families": _strings, "tokenizer_text": _strings, "tokens": _strings, "names": _patterns}
    if not isinstance(value, dict) or not set(value) <= set(readers):
        raise ConfigError(f"{key!r} must be an object with some of {', '.join(readers)}")
    return Recognition(**{name: readers[name](item, f"{key}.{name}") for name, item in value.items()})


def _optional(read: Callable[[Any, str], T]) -> Callable[[Any, str], T | None]:
    return lambda value, key: None if value is None else read(value, key)


_READERS: Mapping[str, Callable[[Any, str], Any]] = {
    "name": _name,
    "description": _string,
    "roles": _roles,
    "user": _pieces,
    "assistant": _pieces,
    "assistant_end": _pieces,
    "generation": _pieces,
    "system": _optional(_pieces),
    "system_in_user": _optional(_system_in_user),
    "observation": _optional(_pieces),
    "default_system": _optional(_string),
    "tools_in_system": _boolean,
    "first_round": _count,
    "has_prefix": _boolean,
    "stop_strings": _strings,
    "stop_tokens": _strings,
    "strips_leading_space": _boolean,
    "recognise": _recognition,
}
