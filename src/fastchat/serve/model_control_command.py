"""`fastchat models ls|load|unload|sleep|wake|pin|unpin`: the models of a running server, and moving them."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import quote

from rich.cells import cell_len

from fastchat.cluster.contract import MODEL_ACTIONS, MODEL_CONTROL_PATH
from fastchat.errors import UnavailableError
from fastchat.serve.chat import add_server_flags, server_of
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
        parser.add_argument("--json", action="store_true", help="write the server's JSON (default: for reading)")


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


def table_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as a terminal shows their widest cell: a Chinese character takes two places."""
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True))
        yield "  ".join(padded).rstrip()


async def _ask(arguments: argparse.Namespace, base_url: str, api_key: str | None) -> Row:
    connection = HttpConnection(base_url, api_key=api_key)
    await connection.open()
    try:
        if arguments.action == "ls":
            documents = [await connection.get(MODEL_CONTROL_PATH, what=_WHAT)]
        else:
            documents = [
                await connection.post(f"{MODEL_CONTROL_PATH}/{quote(name)}/{arguments.action}", {}, what=_WHAT)
                for name in arguments.names
            ]
    finally:
        await connection.close()
    try:
        return {**documents[-1], "data": [dict(row) for document in documents for row in document["data"]]}
    except (KeyError, TypeError, ValueError):
        raise UnavailableError(f"{base_url}{MODEL_CONTROL_PATH} is not {_WHAT}; is this a FastChat server?") from None


def _cells(row: Row) -> tuple[str, ...]:
    """A row for reading; what a worker did not tell is a dash."""
    names = ", ".join(_shown(name) for name in [row.get("id"), *row.get("aliases", [])])
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
