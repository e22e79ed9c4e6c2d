"""`fastchat models ls|load|unload|sleep|wake|pin|unpin|add-adapter|remove-adapter`: the models of a running server."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any
from urllib.parse import quote

from fastchat.cluster.contract import ADAPTERS, MODEL_ACTIONS, MODEL_CONTROL_PATH
from fastchat.errors import ConfigError, UnavailableError
from fastchat.serve.arguments import flag_type
from fastchat.serve.chat import add_server_flags, server_of
from fastchat.serve.columns import table_lines
from fastchat.serve.sizes import size_text
from fastchat.terminal.http_connection import HttpConnection

CONTROL_ACTIONS = ("ls", *MODEL_ACTIONS)
_WHAT = "a list of models"
_HEADINGS = ("MODEL", "STATE", "MEMORY", "LAST USED", "PINNED", "WORKER")
_HELPS = {
    "ls": "list the models of a running server: state, memory, last use",
    "load": "bring models into memory, and wait until they are there",
    "unload": "free models' memory as soon as nobody uses them; the next request loads them again",
    "sleep": "the same as unload",
    "wake": "the same as load",
    "pin": "bring models into memory and keep them there",
    "unpin": "let models leave memory again when that is wanted",
}

Row = dict[str, Any]  # Any: JSON


def add_control_parsers(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """One parser for each action."""
    for action in CONTROL_ACTIONS:
        parser = actions.add_parser(action, help=_HELPS[action], description=f"{_HELPS[action].capitalize()}.")
        if action != "ls":
            parser.add_argument("names", nargs="+", metavar="MODEL", help="a model's name, as `ls` shows it")
        add_server_flags(parser)
        _add_output_flag(parser)
    _add_adapter_parsers(actions)


def _add_adapter_parsers(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    adding = actions.add_parser(
        "add-adapter",
        help="serve an adapter by the engine of its base",
        description="Serve an adapter by the engine of its base, until it is removed or its worker ends. The folder "
        "lies below the workers' --adapter-dir.",
    )
    removing = actions.add_parser(
        "remove-adapter",
        help="serve adapters no more",
        description="Serve adapters no more; what runs with them ends in peace, then their memory is free.",
    )
    for parser in (adding, removing):
        parser.add_argument("base", metavar="BASE", help="the base's name, as `ls` shows it")
    adding.add_argument(
        "adapter",
        type=flag_type(name_and_path),
        metavar="NAME[=FOLDER]",
        help="the name to serve it as, and its folder (default: the folder of that name)",
    )
    removing.add_argument("names", nargs="+", metavar="NAME", help="an adapter's name")
    for parser in (adding, removing):
        add_server_flags(parser)
        _add_output_flag(parser)


def _add_output_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write the server's JSON (default: for reading)")


def name_and_path(text: str) -> tuple[str, str]:
    """`NAME=FOLDER` in two; a name alone is both."""
    name, mark, path = text.partition("=")
    if not name or (mark and not path):
        raise ConfigError(f"{text!r} is not NAME or NAME=FOLDER.")
    return name, path or name


def run_control(arguments: argparse.Namespace) -> int:
    """Ask the server, show what it says. Raises what it answers."""
    url, api_key = server_of(arguments)
    document = asyncio.run(_ask(arguments, url.removesuffix("/v1"), api_key))
    rows = document["data"]
    if arguments.json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")
    elif rows:
        sys.stdout.write("".join(f"{line}\n" for line in table_lines([_HEADINGS, *map(_cells, rows)])))
    else:
        sys.stdout.write("No worker serves a model now.\n")
    return 0


async def _ask(arguments: argparse.Namespace, base_url: str, api_key: str | None) -> Row:
    connection = HttpConnection(base_url, api_key=api_key)
    await connection.open()
    try:
        documents = await _documents(arguments, connection)
    finally:
        await connection.close()
    try:
        return {**documents[-1], "data": [dict(row) for document in documents for row in document["data"]]}
    except (KeyError, TypeError, ValueError):
        raise UnavailableError(f"{base_url}{MODEL_CONTROL_PATH} is not {_WHAT}; is this a FastChat server?") from None


async def _documents(arguments: argparse.Namespace, connection: HttpConnection) -> list[Row]:
    """What the server says to each of the requests that the command stands for."""
    if arguments.action == "ls":
        return [await connection.get(MODEL_CONTROL_PATH, what=_WHAT)]
    if arguments.action == "add-adapter":
        name, path = arguments.adapter
        body = {"name": name, "path": path}
        return [await connection.post(_adapters_path(arguments.base), body, what=_WHAT)]
    if arguments.action == "remove-adapter":
        paths = (f"{_adapters_path(arguments.base)}/{quote(name)}" for name in arguments.names)
        return [await connection.delete(path, what=_WHAT) for path in paths]
    paths = (f"{MODEL_CONTROL_PATH}/{quote(name)}/{arguments.action}" for name in arguments.names)
    return [await connection.post(path, {}, what=_WHAT) for path in paths]


def _adapters_path(base: str) -> str:
    return f"{MODEL_CONTROL_PATH}/{quote(base)}/{ADAPTERS}"


def _cells(row: Row) -> tuple[str, ...]:
    """A row for reading; what a worker did not tell is a dash."""
    names = ", ".join(_shown(name) for name in [row.get("id"), *row.get("aliases", [])])
    names += "".join(f" +{_shown(name)}" for name in row.get("adapters", []))
    memory = row.get("memory_bytes")
    return (
        names,
        _state(row),
        "-" if memory is None else size_text(memory),
        _ago(row.get("last_used")),
        "yes" if row.get("pinned") else "-",
        _shown(row.get("worker")),
    )


def _state(row: Row) -> str:
    state = _shown(row.get("state"))
    if state == "loading":
        state += f" {row.get('progress', 0):.0%}"
    counts = [f"{row[f'num_{what}']} {what}" for what in ("running", "waiting") if row.get(f"num_{what}")]
    return f"{state} ({', '.join(counts)})" if counts else state


def _ago(moment: int | None) -> str:
    if moment is None:
        return "never"
    seconds = max(0, int(time.time()) - moment)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago" if seconds >= 2 else "now"


def _shown(text: object) -> str:
    """As a terminal may get it: nothing in a name moves its cursor."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in str(text))
