"""A command's settings: flag > environment > file > default, and where each came from.

The parser is the one list of options. A flag `--max-context` is the variable FASTCHAT_MAX_CONTEXT and the key
`max-context` of the file; a secret may also lie in a file that FASTCHAT_<NAME>_FILE names.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat.config import CONFIG_VARIABLE, expand_home
from fastchat.errors import ConfigFileError
from fastchat.ops.logs import SECRET_NAMES
from fastchat.serve.config_file import is_of_a_model, read_config_file
from fastchat.serve.option_kind import convert, key_of, kind_of, options_of, refusal_of, variable_of

DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Settings:
    """All values of a command, the place that each came from, and the file that was read."""

    values: argparse.Namespace
    origins: Mapping[str, str]
    file: Path | None


def parse_settings(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *, default_file: Path | None = None
) -> argparse.Namespace:
    """A command's values. `default_file` is read where it is there and no other is named.

    Raises `ConfigFileError` for what the environment or the file says and cannot be obeyed; a wrong flag ends the
    command as argparse does.
    """
    return resolve(parser, argv, os.environ, default_file=default_file).values


def add_config_flag(parser: argparse.ArgumentParser, *, default: str = "none") -> None:
    """`--config`, for a command whose values `parse_settings` reads."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"TOML file with these flags as keys, which flags and FASTCHAT_* variables override (default: {default})",
    )


def resolve(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    environment: Mapping[str, str],
    *,
    default_file: Path | None = None,
) -> Settings:
    """As `parse_settings`, with the origins."""
    actions = options_of(parser)
    file = _file_of(parser, argv, environment, default_file)
    from_file = read_config_file(file, actions) if file is not None else {}
    from_environment = dict(_read_environment(actions, environment))
    unset = {action.dest: None if is_of_a_model(action) else object() for action in actions if not refusal_of(action)}
    is_complete = all(action.dest in {**from_file, **from_environment} for action in actions if action.required)
    values = (_parsed_leniently if is_complete else _parsed)(parser, argv, unset)
    given = {dest: value for dest, value in vars(values).items() if dest in unset and value is not unset[dest]}
    _drop_models_of_the_file(actions, from_file, {**from_environment, **given})
    values.config = None if file is None else str(file)
    origins: dict[str, str] = {}
    for action in actions:
        if refusal_of(action) is not None:
            continue
        value, origin = action.default, DEFAULT
        if isinstance(value, str):  # as argparse: a default that is a text is read like one
            value = convert(action, value)
        if action.dest in given:
            value, origin = given[action.dest], "flag"
        elif action.dest in from_environment:
            value, origin = from_environment[action.dest], f"environment {variable_of(action)}"
        elif action.dest in from_file:
            value, origin = from_file[action.dest], f"file {file}"
        setattr(values, action.dest, value)
        origins[action.dest] = origin
    return Settings(values, origins, file)


def without_options(environment: Mapping[str, str], *parsers: argparse.ArgumentParser) -> dict[str, str]:
    """`environment` for processes that are told everything by flags."""
    names = {variable_of(action) for parser in parsers for action in options_of(parser)}
    names |= {CONFIG_VARIABLE} | {f"{name}_FILE" for name in names if _is_secret(name)}
    return {name: value for name, value in environment.items() if name not in names}


def _file_of(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    environment: Mapping[str, str],
    default_file: Path | None,
) -> Path | None:
    """The file to read: that of `--config`, else of FASTCHAT_CONFIG (empty means none), else the default one."""
    named = _parsed_leniently(parser, argv).config
    if named is None:
        named = environment.get(CONFIG_VARIABLE)
    if named is not None:
        return expand_home(named).absolute() if named else None
    return default_file if default_file is not None and default_file.is_file() else None


def _parsed_leniently(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, unset: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """Parse without asking for required flags, since something else may give them."""
    required = [action for action in parser._actions if action.required]  # noqa: SLF001 - as in `options_of`
    for action in required:
        action.required = False
    try:
        return _parsed(parser, argv, unset or {})
    finally:
        for action in required:
            action.required = True


def _parsed(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, unset: Mapping[str, Any]
) -> argparse.Namespace:
    return parser.parse_args(argv, argparse.Namespace(**unset))


def _read_environment(actions: Sequence[argparse.Action], environment: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for action in actions:
        name = variable_of(action)
        text = environment.get(name)
        if text is None and _is_secret(name) and f"{name}_FILE" in environment:
            name = f"{name}_FILE"
            text = _secret(name, expand_home(environment[name]))
        if text is None:
            continue
        if (reason := refusal_of(action)) is not None:
            raise ConfigFileError(f"{name} is not supported: {reason}")
        try:
            value = convert(action, text)
        except ConfigFileError as error:
            raise ConfigFileError(f"{name}: {error.message}") from None
        yield action.dest, [value] if kind_of(action).is_repeatable else value


def _secret(name: str, path: Path) -> str:
    """One secret a line."""
    try:
        return ",".join(path.read_text(encoding="ascii").split())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"{name}: cannot read {path}: {error}.") from error


def _is_secret(variable: str) -> bool:
    return variable.removeprefix("FASTCHAT_").lower() in SECRET_NAMES


def _drop_models_of_the_file(
    actions: Sequence[argparse.Action], from_file: dict[str, Any], nearer: Mapping[str, Any]
) -> None:
    """Models named on the command line replace those of the file, with their names and formats."""
    of_models = {key_of(action): action.dest for action in actions if is_of_a_model(action)}
    if of_models.get("model-path") in nearer:
        for dest in of_models.values():
            from_file.pop(dest, None)
