"""What the commands share: parsers whose flags may be shortened to a unique prefix, and how a command ends.

Exit codes: 0 ended as asked (also by the first Ctrl-C or SIGTERM), 1 failure, 2 a flag or setting that cannot be
obeyed or a checkpoint that cannot be loaded, 69 unavailable (the port is in use), 78 a configuration file or FASTCHAT_*
variable that cannot be obeyed, 130 ended by force with a second Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

import structlog

from fastchat.cluster.token import load_cluster_token, read_token_file
from fastchat.config import Environment, TlsFiles, expand_home, is_loopback, parse_host, parse_port, parse_url
from fastchat.engine.client import ENGINE_THREAD_NAME
from fastchat.errors import CheckpointError, ConfigError, ConfigFileError, FastChatError, UnavailableError
from fastchat.supervisor.parent_link import tell_error, watch_parent

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_CONFIG = 78  # EX_CONFIG
EXIT_INTERRUPTED = 130  # 128 + SIGINT

DEFAULT_DRAIN_S = 10

_Value = TypeVar("_Value")


def create_parser(module: str, description: str, *, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser for `python3 -m fastchat.serve.<module>`; a flag may be written as any unique prefix of it."""
    return _Parser(
        prog=f"python3 -m fastchat.serve.{module}",
        description=description,
        epilog=epilog,
        formatter_class=_HelpFormatter,
    )


def add_address_flags(parser: argparse.ArgumentParser, *, port: int) -> None:
    """`--host` and `--port` of the process itself."""
    parser.add_argument(
        "--host", type=flag_type(parse_host), default="localhost", help="address to listen on (default: localhost)"
    )
    parser.add_argument(
        "--port",
        type=flag_type(parse_port),
        default=port,
        help=f"port to listen on, 0 for any free one (default: {port})",
    )


def add_allowed_hosts_flag(
    parser: argparse.ArgumentParser, flag: str = "--allowed-hosts", *, what: str, where: str
) -> None:
    """The names by which browsers may call a process that listens at the address of the flag `where`."""
    parser.add_argument(
        flag,
        type=flag_type(_parse_names, join=",".join),
        default=[],
        metavar="NAME[,NAME...]",
        help=f"names {what}, beside localhost and addresses (default: none; any where {where} is not this machine "
        "alone)",
    )


def allowed_hosts(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """The names of `--allowed-hosts` and the process's own; None for any name.

    Who listens for others has a name in their network that is not known here, unless it is told.
    """
    is_here = is_loopback(arguments.host)
    if not arguments.allowed_hosts and not is_here:
        return None
    return (*(() if is_here else (arguments.host,)), *arguments.allowed_hosts)


def add_controller_address_flag(parser: argparse.ArgumentParser) -> None:
    """`--controller-address`, for the processes that talk to the controller."""
    parser.add_argument(
        "--controller-address",
        type=flag_type(parse_url),
        default="http://localhost:21001",
        help="URL of the controller (default: http://localhost:21001)",
    )


def add_security_flags(parser: argparse.ArgumentParser) -> None:
    """`--ssl` and `--cluster-token-file`."""
    parser.add_argument(
        "--ssl", action="store_true", help="serve HTTPS with the files in SSL_KEYFILE and SSL_CERTFILE (default: off)"
    )
    parser.add_argument(
        "--cluster-token-file",
        type=flag_type(expand_home),
        metavar="PATH",
        help="file with the cluster token (default: FASTCHAT_CLUSTER_TOKEN, else the state directory's cluster-token)",
    )


def add_drain_flag(parser: argparse.ArgumentParser) -> None:
    """`--drain-timeout`, for the processes that answer requests."""
    parser.add_argument(
        "--drain-timeout",
        type=flag_type(_seconds),
        default=DEFAULT_DRAIN_S,
        metavar="SECONDS",
        help="how long requests in flight may go on after the first SIGTERM or Ctrl-C; what then still runs is told "
        f"and ended (default: {DEFAULT_DRAIN_S})",
    )


def add_log_flag(parser: argparse.ArgumentParser) -> None:
    """`--log-level`, for every server."""
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="the least that is logged: debug, info, warning or error (default: info)",
    )


def log_level(arguments: argparse.Namespace) -> str:
    """For `configure_logging`. FastChat's `--debug`, where a command has it, is the level debug."""
    return "DEBUG" if getattr(arguments, "debug", "") else str(arguments.log_level).upper()


def add_refused_flag(parser: argparse.ArgumentParser, flag: str, *, reason: str, takes_value: bool = True) -> None:
    """A flag of FastChat that is known and not obeyed: giving it ends the command with `reason`, in one line."""
    parser.add_argument(
        flag,
        action=RefusedFlag,
        nargs=None if takes_value else 0,
        const=reason,
        default=argparse.SUPPRESS,
        help=argparse.SUPPRESS,
    )


def warn_of_plain_listener(arguments: argparse.Namespace) -> None:
    """Say loudly that the cluster token and what users write can be read on the way, where that is so."""
    if not arguments.ssl and not is_loopback(arguments.host):
        structlog.stdlib.get_logger(__name__).warning(
            "NOT ENCRYPTED: the cluster token, prompts and answers travel readably to other machines; use --ssl, or a "
            "network that nobody else can read"
        )


def tls_files(arguments: argparse.Namespace, environment: Environment) -> TlsFiles | None:
    """The key and certificate where `--ssl` was given. Raises `ConfigError` where they are missing."""
    return environment.tls_files() if arguments.ssl else None


def cluster_token(arguments: argparse.Namespace, environment: Environment) -> str:
    """The token of `--cluster-token-file`, else of the environment, else of the state directory."""
    path: Path | None = arguments.cluster_token_file
    return load_cluster_token(None if path is None else read_token_file(path), environment=environment)


@dataclass(frozen=True, slots=True)
class FlagType(Generic[_Value]):
    """An argparse type; `join` writes a list, as a configuration file has it, the way the flag has it."""

    parse: Callable[[str], _Value]
    join: Callable[[Iterable[str]], str] | None = None

    def __call__(self, text: str) -> _Value:
        try:
            return self.parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(error.message) from error


def flag_type(
    parse: Callable[[str], _Value], *, join: Callable[[Iterable[str]], str] | None = None
) -> FlagType[_Value]:
    """`parse` as an argparse type: its `ConfigError` becomes the parser's one-line message."""
    return FlagType(parse, join)


def run_command(main: Callable[[Sequence[str] | None], int]) -> NoReturn:
    """Run a command's `main` and leave the process: an error on purpose is one line on stderr, not a traceback.

    Where `fastchat serve` started this process, that line is handed to it, to be said last and once.
    """
    # As stderr does: a model's name may not exist in the locale's encoding.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        watch_parent()
        exit_code = main(None)
    except FastChatError as error:
        if not tell_error(error.message):
            sys.stderr.write(f"error: {error.message}\n")
        exit_code = exit_code_of(error)
    except KeyboardInterrupt:
        exit_code = EXIT_INTERRUPTED
    _leave(exit_code)


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 86400):
        raise ConfigError(f"{text!r} is not a whole number of seconds from 1 to 86400.")
    return int(text)


def _parse_names(text: str) -> list[str]:
    return [parse_host(name) for name in text.split(",")]


def exit_code_of(error: FastChatError) -> int:
    """The exit code that tells a program why the command failed."""
    if isinstance(error, ConfigFileError):
        return EXIT_CONFIG
    if isinstance(error, ConfigError | CheckpointError):
        return EXIT_USAGE
    return EXIT_UNAVAILABLE if isinstance(error, UnavailableError) else EXIT_FAILURE


def _leave(exit_code: int) -> NoReturn:
    """End the process; at once where an engine's thread is still inside torch (loading, or hung in a step).

    The interpreter's own end would take such a thread down in the middle of its work, and torch then aborts.
    """
    if any(thread.name.startswith(ENGINE_THREAD_NAME) for thread in threading.enumerate()):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error, and names the flag that was meant."""

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith(("?", ".")) else "."
        self.exit(EXIT_USAGE, f"error: {message}{end} `{self.prog} --help` lists the flags.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # Any: as argparse has it, which overloads it
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return values

    def _meant(self, word: str) -> str:
        if not word.startswith("-"):
            return f"; did you mean --model-path {word}?" if "--model-path" in self._option_string_actions else ""
        close = get_close_matches(word.partition("=")[0].replace("_", "-"), self._option_string_actions, n=1)
        return f"; did you mean {close[0]}?" if close else ""


class _HelpFormatter(argparse.HelpFormatter):
    """Wide enough for one line per flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=140)


class RefusedFlag(argparse.Action):
    """Ends the command with the reason in `const`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,  # noqa: ARG002 - argparse calls with it
        values: Any,  # noqa: ARG002 - argparse calls with it; Any: whatever follows the flag
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string} is not supported: {self.const}")
