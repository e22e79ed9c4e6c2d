"""`python3 -m fastchat.serve.openai_api_server`: the OpenAI API over all workers that the controller knows.

It starts in any order relative to the controller and the workers: until they are there it answers 503 and says for whom
it waits.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence

import structlog

from fastchat.arena.routes import Arena, ArenaConfig
from fastchat.config import is_loopback, read_environment
from fastchat.errors import ConfigError
from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig, CorsConfig
from fastchat.gateway.mounted import MountedRoutes
from fastchat.gateway.openapi import Operation
from fastchat.ops.key_store import STORE_FILE_NAME, has_keys
from fastchat.ops.logs import configure_logging, log_arguments
from fastchat.serve.arguments import (
    add_address_flags,
    add_allowed_hosts_flag,
    add_controller_address_flag,
    add_drain_flag,
    add_log_flag,
    add_security_flags,
    allowed_hosts,
    cluster_token,
    create_parser,
    flag_type,
    log_level,
    run_command,
    tls_files,
)
from fastchat.serve.http_server import bind_listeners, run_server
from fastchat.serve.settings import add_config_flag, parse_settings

DEFAULT_PORT = 8000
ARENA_FILE = "arena.sqlite"
"""In the state directory."""

_log = structlog.get_logger(__name__)


def create_api_server_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "openai_api_server",
        "The API server: answers OpenAI's API with the workers that the controller knows.",
        epilog="Listens on this machine only; --host 0.0.0.0 opens it to others, and --api-keys decides to whom.",
    )
    add_address_flags(parser, port=DEFAULT_PORT)
    add_controller_address_flag(parser)
    parser.add_argument(
        "--expect-models",
        type=flag_type(_parse_json_list, join=json.dumps),
        default=[],
        metavar="JSON",
        help="JSON list of models that are being loaded: while no worker has one, it is answered as unavailable (503, "
        "try again) and not as unknown (default: none)",
    )
    add_access_flags(parser)
    add_arena_flags(parser)
    add_log_flag(parser)
    add_drain_flag(parser)
    add_security_flags(parser)
    add_config_flag(parser)
    return parser


def add_access_flags(parser: argparse.ArgumentParser) -> None:
    """Who may call: the API server's flags that `fastchat serve` has too."""
    parser.add_argument(
        "--api-keys",
        type=flag_type(_parse_keys, join=",".join),
        metavar="KEY[,KEY...]",
        help="keys that clients must send, comma separated, beside those of `fastchat keys` (default: none)",
    )
    add_allowed_hosts_flag(parser, what="that may stand in Host while no key is needed", where="--host")
    parser.add_argument(
        "--allow-credentials", action="store_true", help="CORS: let web pages send credentials (default: off)"
    )
    for what, default, meaning in (
        ("origins", [], "origins of web pages that may call"),
        ("methods", ["*"], "methods they may use"),
        ("headers", ["*"], "headers they may send"),
    ):
        parser.add_argument(
            f"--allowed-{what}",
            type=flag_type(_parse_json_list, join=json.dumps),
            default=default,
            metavar="JSON",
            help=f"CORS: JSON list of {meaning}, such as '[\"*\"]' (default: {'none' if not default else 'all'})",
        )


def add_arena_flags(parser: argparse.ArgumentParser) -> None:
    """What is kept of compared answers: the API server's flag that `fastchat serve` has too."""
    parser.add_argument(
        "--arena-log-text",
        action="store_true",
        help="keep the conversations of compared models with their votes (default: lengths, times and digests alone)",
    )


def mounted_arena(config: ArenaConfig) -> MountedRoutes:
    """The arena, as the API server takes it in."""
    arena = Arena(config)
    return MountedRoutes(
        tuple(
            (
                Operation(
                    route.method,
                    route.path,
                    route.summary,
                    route.body,
                    can_stream=route.can_stream,
                    query=route.query,
                    answer_type=route.answer_type,
                ),
                route.endpoint,
            )
            for route in arena.routes()
        ),
        arena.keep_open,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the API server until a signal ends it; returns the exit code."""
    arguments = parse_settings(create_api_server_parser(), argv)
    configure_logging("openai_api_server", level=log_level(arguments))
    log_arguments(arguments)
    environment = read_environment()
    tls = tls_files(arguments, environment)
    listeners = bind_listeners(arguments.host, arguments.port)
    key_store_path = environment.state_dir / STORE_FILE_NAME
    config = ApiServerConfig(
        cluster_token=cluster_token(arguments, environment),
        controller_address=arguments.controller_address,
        api_keys=tuple(arguments.api_keys or ()),
        page_key=environment.page_key,
        key_store_path=key_store_path,
        expected_models=tuple(arguments.expect_models),
        allowed_hosts=allowed_hosts(arguments),
        cors=CorsConfig(
            allow_credentials=arguments.allow_credentials,
            allowed_origins=tuple(arguments.allowed_origins),
            allowed_methods=tuple(arguments.allowed_methods),
            allowed_headers=tuple(arguments.allowed_headers),
        ),
    )
    if not config.api_keys and not is_loopback(arguments.host) and not has_keys(key_store_path):
        _warn_of_open_door(arguments.host)
    arena = ArenaConfig(environment.state_dir / ARENA_FILE, logs_text=arguments.arena_log_text)
    app = create_api_app(config, [mounted_arena(arena)])
    gc.freeze()  # what was imported stays: a collection that walked through it would cost each request a tenth more
    return run_server(app, listeners, tls=tls, drain_s=arguments.drain_timeout, has_websockets=False)


def _warn_of_open_door(host: str) -> None:
    everywhere = host in ("0.0.0.0", "::")  # noqa: S104 - compared with, not bound
    where = "any address of this machine" if everywhere else host
    _log.warning(
        f"NO API KEY IS SET: everyone who can reach {where} may use all models; "
        "make a key now with `fastchat keys create`, or set one with --api-keys"
    )


def _parse_keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    if not all(key and key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise ConfigError("give keys of printable ASCII without spaces, separated by single commas.")
    return keys


def _parse_json_list(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{text!r} is not a JSON list of strings; write it like '[\"https://example.org\"]'.")
    return names


if __name__ == "__main__":
    run_command(main)
