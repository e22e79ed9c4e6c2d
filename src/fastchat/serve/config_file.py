"""A command's configuration file: TOML whose keys are the command's flags without their dashes in front.

    port = 8000
    api-keys = ["one", "two"]

    [[models]]
    path = "/models/chatglm2-6b"

There is no second list of options: what a key may be is read from the command's parser. Flags that may be repeated
belong to a model each, and stand in the tables `[[models]]`.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from fastchat.errors import ConfigFileError
from fastchat.serve.option_kind import OptionKind, convert, key_of, kind_of, refusal_of

MODELS = "models"
_MODEL_PREFIX = "model-"

Table = Mapping[str, Any]  # Any: what TOML can hold


def read_config_file(path: Path, actions: Sequence[argparse.Action]) -> dict[str, Any]:  # Any: argparse's values
    """The values of a file by their names in argparse's namespace. Raises `ConfigFileError` for all it cannot obey."""
    document = _read(path)
    models = {_model_key(action): action for action in actions if is_of_a_model(action)}
    options = {key_of(action): action for action in actions if not is_of_a_model(action)}
    values: dict[str, Any] = {}
    for key, value in document.items():
        if key == MODELS and models:
            values.update(_model_values(path, value, models))
        elif key in options:
            values[options[key].dest] = _value(path, key, options[key], value)
        elif key in {key_of(action) for action in models.values()}:
            raise ConfigFileError(
                f"{path}: {key} belongs to a model; write a table [[{MODELS}]] with {_model_key(_named(models, key))}."
            )
        else:
            obeyed = [key for key, action in options.items() if refusal_of(action) is None]
            raise _unknown(path, key, [*obeyed, *([MODELS] if models else [])])
    return values


def is_of_a_model(action: argparse.Action) -> bool:
    """Whether a flag may be given once for each model."""
    return kind_of(action).is_repeatable


def model_tables(actions: Sequence[argparse.Action], values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The models among a command's values, each as the table that a file would have."""
    named = {_model_key(action): values.get(action.dest) for action in actions if is_of_a_model(action)}
    given = {key: each for key, each in named.items() if each}
    for number in range(max(map(len, given.values()), default=0)):
        row = {key: each[min(number, len(each) - 1)] for key, each in given.items()}
        yield {key: value for key, value in row.items() if value not in (None, ())}


def _read(path: Path) -> Table:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigFileError(f"cannot read the configuration file {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigFileError(f"{path} is not UTF-8 text.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(f"{path} is not TOML: {error}") from error


def _model_values(path: Path, tables: object, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    """The columns of `[[models]]` as the lists that repeated flags give."""
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise ConfigFileError(f"{path}: {MODELS} must be tables; write [[{MODELS}]] before the keys of each model.")
    rows = [_model_row(path, number, table, actions) for number, table in enumerate(tables, start=1)]
    given = {key: action for key, action in actions.items() if any(key in row for row in rows)}
    return {
        action.dest: [row.get(key, () if kind_of(action).join else None) for row in rows]
        for key, action in given.items()
    }


def _model_row(path: Path, number: int, table: Table, actions: Mapping[str, argparse.Action]) -> dict[str, Any]:
    where = f"{MODELS}[{number}]."
    unknown = [key for key in table if key not in actions]
    if unknown:
        raise _unknown(path, unknown[0], list(actions), where=where)
    for key, action in actions.items():
        if (action.required or key == "path") and key not in table:
            raise ConfigFileError(f"{path}: {where}{key} is missing; each of [[{MODELS}]] needs it.")
    return {key: _value(path, where + key, actions[key], value) for key, value in table.items()}


def _value(path: Path, key: str, action: argparse.Action, value: object) -> Any:
    reason = refusal_of(action)
    if reason is not None:
        raise ConfigFileError(f"{path}: {key} is not supported: {reason}")
    kind = kind_of(action)
    text = _text(kind, value)
    if text is None:
        raise ConfigFileError(f"{path}: {key} must be {kind.expected}, not {_shown(value)}.")
    if isinstance(text, bool):
        return text
    if value == [] and action.default in ([], ()):  # not so for keys: an empty list of them must not open the server
        return action.default
    try:
        return convert(action, text)
    except ConfigFileError as error:
        raise ConfigFileError(f"{path}: {key}: {error.message}") from None


def _text(kind: OptionKind, value: object) -> str | bool | None:
    """The value as one would write it after the flag; None where its type is another one."""
    if isinstance(value, bool):
        return value if bool in kind.types else None
    if kind.join is not None:
        return kind.join(value) if _is_list_of_texts(value, kind) else None
    if isinstance(value, tuple(kind.types)):
        return str(value)
    return None


def _is_list_of_texts(value: object, kind: OptionKind) -> bool:
    if not isinstance(value, list):
        return False
    # A comma inside an item of a comma list would make two of it.
    return all(isinstance(item, str) and (kind.separator is None or kind.separator not in item) for item in value)


def _shown(value: object) -> str:
    """What stands there, for the message; tables and dates by what they are."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'the text "{value}"'
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list):
        return "another list"
    return "a table" if isinstance(value, dict) else "a date or time"


def _unknown(path: Path, key: str, known: Sequence[str], *, where: str = "") -> ConfigFileError:
    close = get_close_matches(key.lower().replace("_", "-"), known, n=1)
    hint = f"did you mean {where}{close[0]}?" if close else f"known are {', '.join(sorted(known))}."
    return ConfigFileError(f"{path}: {where}{key} is not a setting; {hint}")


def _model_key(action: argparse.Action) -> str:
    return key_of(action).removeprefix(_MODEL_PREFIX)


def _named(models: Mapping[str, argparse.Action], key: str) -> argparse.Action:
    return next(action for action in models.values() if key_of(action) == key)
