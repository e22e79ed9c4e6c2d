"""`fastchat votes`: writes all votes and feedback of this machine's state directory as JSON lines; needs no server."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastchat.arena.database import Database
from fastchat.arena.records import SCHEMA
from fastchat.arena.vote_log import VoteLog
from fastchat.config import expand_home, read_environment
from fastchat.errors import ConfigError, UnavailableError
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import EXIT_FAILURE, create_parser, flag_type, run_command
from fastchat.serve.openai_api_server import ARENA_FILE


def create_votes_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "votes_command",
        "Write all votes on compared models, and feedback on answers, as JSON lines to standard output.",
    )
    parser.prog = "fastchat votes"
    parser.add_argument(
        "--file",
        type=flag_type(expand_home),
        metavar="PATH",
        help=f"the records (default: {ARENA_FILE} in the state directory)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Write them; returns the exit code."""
    arguments = create_votes_parser().parse_args(argv)
    configure_logging("votes", level="WARNING")
    path = arguments.file or read_environment().state_dir / ARENA_FILE
    if not path.is_file():
        raise ConfigError(f"{path}: there are no votes yet; an API server of this state directory keeps them there.")
    try:
        asyncio.run(_write_all(path))
    except BrokenPipeError:  # whoever read it has left (`| head`): also what is written at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILURE
    return 0


async def _write_all(path: Path) -> None:
    database = Database(path, SCHEMA, writes=False)
    await database.open()
    try:
        async for lines in await VoteLog(database).export(tenant=None):
            sys.stdout.write(lines.decode())
        sys.stdout.flush()
    except UnavailableError:
        raise UnavailableError(f"{path} cannot be read as votes; the line above has the cause.") from None
    finally:
        await database.close()


if __name__ == "__main__":
    run_command(main)
