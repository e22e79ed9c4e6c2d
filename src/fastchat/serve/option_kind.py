"""What a flag is, read from its argparse definition: its key, its variable, what its value may be."""

from __future__ import annotations

import argparse
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastchat.config import parse_bytes
from fastchat.errors import ConfigError, ConfigFileError
from fastchat.serve.arguments import FlagType, RefusedFlag

VARIABLE_PREFIX = "FASTCHAT_"
_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off", ""})


@dataclass(frozen=True, slots=True)
class OptionKind:
    """What a value may be: TOML's types and the words for it. `join` writes a list as the flag has it."""

    expected: str
    types: tuple[type, ...]
    join: Callable[[Any], str] | None = None  # Any: a list of texts
    separator: str | None = None
    is_repeatable: bool = False


def options_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The flags of a command that a file or the environment may give too."""
    hidden = ("help", "config", "json")
    return [action for action in parser._actions if action.option_strings and action.dest not in hidden]  # noqa: SLF001 - argparse has no public way to ask a parser for its flags


def key_of(action: argparse.Action) -> str:
    """The key of a flag in a file: its long name without the dashes in front."""
    return next(flag for flag in action.option_strings if flag.startswith("--")).removeprefix("--")


def variable_of(action: argparse.Action) -> str:
    """The environment variable of a flag."""
    return VARIABLE_PREFIX + key_of(action).upper().replace("-", "_")


def kind_of(action: argparse.Action) -> OptionKind:
    """What the flag's value may be."""
    is_repeatable = isinstance(action, argparse._AppendAction)  # noqa: SLF001 - argparse names its actions so
    if action.nargs == 0:
        return OptionKind("true or false", (bool,))
    if action.choices is not None:
        return OptionKind(f"one of {', '.join(map(repr, action.choices))}", (str,), is_repeatable=is_repeatable)
    parse = action.type.parse if isinstance(action.type, FlagType) else action.type
    if isinstance(action.type, FlagType) and action.type.join is not None:
        join = action.type.join
        separator = "," if join(["a", "b"]) == "a,b" else None
        expected = "a list of texts" if separator is None else "a list of texts without commas"
        return OptionKind(expected, (list,), join, separator, is_repeatable)
    if parse is parse_bytes:
        return OptionKind('a size such as "13GiB", or a number of bytes', (int, str), is_repeatable=is_repeatable)
    result = _result_of(parse)
    if result is int:
        return OptionKind("a whole number", (int,), is_repeatable=is_repeatable)
    if result is float:
        return OptionKind("a number", (int, float), is_repeatable=is_repeatable)
    if action.nargs == "?":
        return OptionKind("true or false", (bool, str))
    return OptionKind("a text in quotation marks", (str,), is_repeatable=is_repeatable)


def refusal_of(action: argparse.Action) -> str | None:
    """Why a flag is known and not obeyed; None for one that is."""
    return str(action.const) if isinstance(action, RefusedFlag) else None


def convert(action: argparse.Action, text: str) -> Any:
    """`text` as argparse would take it after the flag, one value of a repeatable one. Raises `ConfigFileError`."""
    if action.nargs == 0:
        return as_bool(text)
    if action.nargs == "?" and text.strip().lower() in _FALSE:
        return action.default
    try:
        value = action.type(text) if callable(action.type) else text
    except (ConfigError, argparse.ArgumentTypeError) as error:
        raise ConfigFileError(str(error)) from None
    except ValueError:
        raise ConfigFileError(f"{text!r} is not {kind_of(action).expected}.") from None
    if action.choices is not None and value not in action.choices:
        raise ConfigFileError(f"{text!r} is not {kind_of(action).expected}.")
    return value


def as_bool(text: str) -> bool:
    """A yes or no as people write it in the environment."""
    word = text.strip().lower()
    if word not in _TRUE | _FALSE:
        raise ConfigFileError(f"{text!r} is not true or false.")
    return word in _TRUE


def _result_of(parse: object) -> object:
    if parse is None or isinstance(parse, type):
        return parse
    return typing.get_type_hints(parse).get("return")
