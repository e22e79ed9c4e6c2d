"""`fastchat config show`: what `fastchat serve` would do with these flags, this environment and this file, and why."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastchat.config import config_file, read_environment
from fastchat.ops.logs import MASK, SECRET_NAMES
from fastchat.serve.arguments import run_command
from fastchat.serve.config_file import MODELS, is_of_a_model, model_tables
from fastchat.serve.launch import create_serve_parser
from fastchat.serve.option_kind import key_of, options_of, refusal_of
from fastchat.serve.settings import Settings, resolve


def create_config_parser() -> argparse.ArgumentParser:
    """The flags of `fastchat serve`, and what to do with them."""
    parser = create_serve_parser()
    parser.prog = "fastchat config"
    parser.description = "Every setting of `fastchat serve` with its value and where it came from; secrets are masked."
    parser.epilog = (
        "Takes all flags of `fastchat serve`, and reads the same file and environment. What it prints is TOML: a "
        "configuration file to begin with. Exit code 78: the file or the environment says what cannot be obeyed."
    )
    parser.add_argument("action", choices=["show"], help="print all settings")
    parser.add_argument("--json", action="store_true", help="write JSON: value and origin of each setting")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Show; returns the exit code. Raises `ConfigFileError` for what cannot be obeyed."""
    parser = create_config_parser()
    settings = resolve(parser, argv, os.environ, default_file=config_file())
    actions = [action for action in options_of(parser) if refusal_of(action) is None]
    if settings.values.json:
        sys.stdout.write(json.dumps(_as_json(actions, settings), ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(_as_toml(actions, settings)) + "\n")
    return 0


def _as_toml(actions: Sequence[argparse.Action], settings: Settings) -> Iterator[str]:
    """A setting a line; one without a value is a comment."""
    yield f"# file: {settings.file or f'none ({config_file()} is not there)'}"
    yield f"# state directory: {read_environment().state_dir}"
    rows = []
    for action in actions:
        if not is_of_a_model(action):
            value = _shown(action, settings)
            written = f"# {key_of(action)} =" if value is None else f"{key_of(action)} = {_toml(value)}"
            rows.append((written, settings.origins[action.dest]))
    width = max(len(written) for written, _ in rows)
    yield from (f"{written:<{width}}  # {origin}" for written, origin in rows)
    origin = next(settings.origins[action.dest] for action in actions if is_of_a_model(action))
    tables = list(model_tables(actions, vars(settings.values)))
    if not tables:
        yield f"# no [[{MODELS}]]: the tiny demo model is served"
    for table in tables:
        yield ""
        yield f"[[{MODELS}]]  # {origin}"
        yield from (f"{key} = {_toml(_plain(value))}" for key, value in table.items())


def _as_json(actions: Sequence[argparse.Action], settings: Settings) -> dict[str, Any]:  # Any: JSON
    shown: dict[str, Any] = {
        key_of(action): {"value": _shown(action, settings), "origin": settings.origins[action.dest]}
        for action in actions
        if not is_of_a_model(action)
    }
    origin = next(settings.origins[action.dest] for action in actions if is_of_a_model(action))
    tables = [
        {key: _plain(value) for key, value in table.items()} for table in model_tables(actions, vars(settings.values))
    ]
    return {**shown, MODELS: {"value": tables, "origin": origin}}


def _shown(action: argparse.Action, settings: Settings) -> Any:
    value = _plain(getattr(settings.values, action.dest))
    return MASK if action.dest in SECRET_NAMES and value else value


def _plain(value: Any) -> Any:
    """A value as TOML and JSON know it."""
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _toml(value: Any) -> str:
    """TOML's strings, lists and numbers are written as JSON's."""
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    run_command(main)
