"""`python3 -m fastchat.serve.controller`: the process that knows all workers.

Workers keep a connection to it and API servers watch it, both with the cluster token. It relays no request itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fastchat.cluster.dial_rules import parse_allowed_workers
from fastchat.config import read_environment
from fastchat.errors import ConfigError
from fastchat.gateway.controller_app import Controller, ControllerConfig, create_controller_app
from fastchat.ops.logs import configure_logging, log_arguments
from fastchat.serve.arguments import (
    add_address_flags,
    add_drain_flag,
    add_log_flag,
    add_security_flags,
    cluster_token,
    create_parser,
    flag_type,
    log_level,
    run_command,
    tls_files,
    warn_of_plain_listener,
)
from fastchat.serve.http_server import bind_listeners, run_server
from fastchat.serve.settings import add_config_flag, parse_settings

DEFAULT_PORT = 21001
USAGE_FILE_NAME = "usage.sqlite3"


def create_controller_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "controller",
        "The controller: knows which worker serves which model.",
        epilog="Listens on this machine only; --host 0.0.0.0 lets workers and API servers of other machines in, "
        "which need this cluster's token (FASTCHAT_CLUSTER_TOKEN).",
    )
    add_address_flags(parser, port=DEFAULT_PORT)
    parser.add_argument(
        "--dispatch-method",
        choices=["shortest_queue", "lottery"],
        default="shortest_queue",
        help="how a worker is chosen: shortest_queue, by outstanding tokens (default); lottery is refused",
    )
    add_allowed_workers_flag(parser)
    add_log_flag(parser)
    add_drain_flag(parser)
    add_security_flags(parser)
    add_config_flag(parser)
    return parser


def add_allowed_workers_flag(parser: argparse.ArgumentParser) -> None:
    """`--allowed-workers`: the controller's flag that `fastchat serve` has too."""
    parser.add_argument(
        "--allowed-workers",
        type=flag_type(parse_allowed_workers, join=",".join),
        default=[],
        metavar="LIST",
        help="networks, addresses and host names where workers and servers registered by URL may be, comma separated, "
        "beside this machine and private networks (default: none)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the controller until a signal ends it; returns the exit code."""
    arguments = parse_settings(create_controller_parser(), argv)
    if arguments.dispatch_method == "lottery":
        raise ConfigError(
            "--dispatch-method lottery is not offered: the API server sends each request to the worker with the "
            "fewest outstanding tokens, which chance can only make worse; leave the flag out."
        )
    configure_logging("controller", level=log_level(arguments))
    log_arguments(arguments)
    environment = read_environment()
    tls = tls_files(arguments, environment)
    listeners = bind_listeners(arguments.host, arguments.port)
    warn_of_plain_listener(arguments)
    config = ControllerConfig(
        cluster_token=cluster_token(arguments, environment),
        usage_path=environment.state_dir / USAGE_FILE_NAME,
        allowed_workers=tuple(arguments.allowed_workers),
    )
    app = create_controller_app(config)
    controller: Controller = app.state.controller
    return run_server(app, listeners, tls=tls, on_stop=controller.stop, drain_s=arguments.drain_timeout)


if __name__ == "__main__":
    run_command(main)
