"""`fastchat chat`: talks in the terminal with a model of a running server, ours or any OpenAI-compatible one."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence

from fastchat.errors import ConfigError, ModelNotFoundError, UnavailableError
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import create_parser, flag_type, run_command
from fastchat.serve.terminal_arguments import EPILOG, add_session_flags, create_screen, run_session
from fastchat.terminal.remote_talker import RemoteTalker, base_url_of, list_models
from fastchat.terminal.screen import Screen, choose_from

DEFAULT_URL = "http://127.0.0.1:8000"
URL_VARIABLE = "OPENAI_BASE_URL"
KEY_VARIABLE = "OPENAI_API_KEY"


def create_chat_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser("chat", "Talk in the terminal with a model of a running server.", epilog=EPILOG)
    parser.prog = "fastchat chat"
    add_server_flags(parser)
    parser.add_argument(
        "--model", metavar="NAME", help="which of its models (default: the only one, else you are asked)"
    )
    add_session_flags(parser, max_new_tokens=None)
    return parser


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which server, and the key for it."""
    parser.add_argument(
        "--url",
        type=flag_type(base_url_of),
        metavar="URL",
        help=f"the server; without a path /v1 is added (default: {URL_VARIABLE}, else {DEFAULT_URL})",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key for the server, seen by others of this machine (default: {KEY_VARIABLE})"
    )


def server_of(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """The server's URL with its `/v1`, and the key for it: of the flags, else of the environment."""
    return arguments.url or _url_of_environment(), arguments.api_key or os.environ.get(KEY_VARIABLE) or None


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until the input ends; returns the exit code."""
    arguments = create_chat_parser().parse_args(argv)
    configure_logging("chat", level="WARNING")
    screen = create_screen(arguments)
    url, api_key = server_of(arguments)
    with asyncio.Runner() as runner:
        served = runner.run(list_models(url, api_key=api_key))
    try:
        model_name = _chosen(arguments.model, served, url, screen)
    except EOFError:  # nothing was chosen
        return 0
    return run_session(arguments, screen, RemoteTalker(url, api_key=api_key, model_name=model_name))


def _url_of_environment() -> str:
    text = os.environ.get(URL_VARIABLE) or DEFAULT_URL
    try:
        return base_url_of(text)
    except ConfigError as error:
        raise ConfigError(f"{URL_VARIABLE}: {error.message}") from None


def _chosen(wanted: str | None, served: Sequence[str], url: str, screen: Screen) -> str:
    """The model to talk with; a person at the keyboard is asked, a program has to name it."""
    if wanted is not None:
        if wanted not in served:
            raise ModelNotFoundError(wanted, served)
        return wanted
    if not served:
        raise UnavailableError(f"{url} serves no model yet; start a worker and try again.")
    if len(served) == 1:
        return served[0]
    if not sys.stdin.isatty():
        raise ConfigError(f"Several models are served ({', '.join(served)}); choose one with --model.")
    return choose_from(screen, "model", served)


if __name__ == "__main__":
    run_command(main)
