"""`fastchat compare`: shows the answers of two models of a running server side by side, and takes a vote."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fastchat.errors import ConfigError
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import EXIT_FAILURE, create_parser, flag_type, run_command
from fastchat.serve.chat import add_server_flags, server_of
from fastchat.serve.terminal_arguments import add_sampling_flags
from fastchat.terminal.answer_columns import LabelledAnswers, LiveColumns
from fastchat.terminal.compare_session import VOTES, CompareSession
from fastchat.terminal.comparison import Comparison
from fastchat.terminal.http_connection import HttpConnection
from fastchat.terminal.screen import SimpleScreen, clean, make_plain_streams

_EPILOG = (
    "Without a prompt it is asked for at the keyboard, round after round; a pipe is read to its end as one prompt. "
    "Ctrl-C stops the answers. Names of a blind round are told after the vote."
)


def create_compare_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser("compare", "Show two models' answers side by side, and vote.", epilog=_EPILOG)
    parser.prog = "fastchat compare"
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to ask, once (default: see below)")
    add_server_flags(parser)
    parser.add_argument(
        "--models",
        type=flag_type(_parse_models),
        metavar="NAME,NAME",
        help="which models, two to four (default: two are drawn and stay unnamed until the vote)",
    )
    parser.add_argument(
        "--blind", action="store_true", help="with --models: two of these are drawn and stay unnamed (default: off)"
    )
    parser.add_argument(
        "--vote",
        choices=sorted(VOTES.values()),
        help="vote without being asked, with a PROMPT or a pipe (default: a person is asked)",
    )
    parser.add_argument("--conv-system-msg", metavar="TEXT", default="", help="system message (default: the format's)")
    add_sampling_flags(parser, None)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Compare until the input ends; returns the exit code."""
    arguments = create_compare_parser().parse_args(argv)
    configure_logging("compare", level="WARNING")
    make_plain_streams()
    prompt = _prompt_of(arguments)
    if prompt is None and arguments.vote is not None:
        raise ConfigError("--vote needs a PROMPT, or one in a pipe.")
    url, api_key = server_of(arguments)
    connection = HttpConnection(url.removesuffix("/v1"), api_key=api_key)
    with asyncio.Runner() as runner:
        try:
            runner.run(connection.open())
            return _compare(arguments, prompt, connection, runner)
        except BrokenPipeError:  # whoever read it has left (`| head`): also what is written at exit goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return EXIT_FAILURE
        finally:
            runner.run(connection.close())


def _compare(
    arguments: argparse.Namespace, prompt: str | None, connection: HttpConnection, runner: asyncio.Runner
) -> int:
    request = _request_of(arguments)
    session = CompareSession(
        lambda: Comparison(connection, request, system_message=arguments.conv_system_msg),
        LiveColumns() if sys.stdout.isatty() and not Console().is_dumb_terminal else LabelledAnswers(),
        SimpleScreen(),
        runner.run,
    )
    if prompt is None:
        session.talk()
        return 0
    is_person = sys.stdin.isatty() and sys.stdout.isatty() and arguments.vote is None
    return 0 if session.ask_once(prompt, arguments.vote, asks_for_vote=is_person) else EXIT_FAILURE


def _prompt_of(arguments: argparse.Namespace) -> str | None:
    """What to ask once, None where a person is to be asked."""
    prompt = " ".join(arguments.prompt)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise ConfigError("The prompt is empty; give one, or write it into the pipe.")
    return clean(prompt) if prompt else None


def _request_of(arguments: argparse.Namespace) -> dict[str, Any]:  # Any: JSON
    """What every turn of a round sends."""
    given = {
        "models": arguments.models,
        "blind": True if arguments.blind or arguments.models is None else None,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "repetition_penalty": arguments.repetition_penalty,
        "max_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
    }
    return {name: value for name, value in given.items() if value is not None}


def _parse_models(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(names) < 2:
        raise ConfigError("give at least two names, separated by commas.")
    return names


if __name__ == "__main__":
    run_command(main)
