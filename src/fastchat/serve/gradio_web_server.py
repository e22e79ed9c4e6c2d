"""`python3 -m fastchat.serve.gradio_web_server`: the page to chat with the models that an API server serves.

FastChat's page asked the controller which models there are. Ours is a client of the API server alone: `--api-url`, or
for a FastChat command line with `--controller-url` the API server's usual port on the controller's machine.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from urllib.parse import urlsplit

import structlog

from fastchat.config import expand_home, is_loopback, parse_host, parse_port, parse_url
from fastchat.ops.logs import configure_logging, log_arguments
from fastchat.serve.arguments import (
    add_address_flags,
    add_allowed_hosts_flag,
    add_log_flag,
    add_refused_flag,
    allowed_hosts,
    create_parser,
    flag_type,
    log_level,
    run_command,
)
from fastchat.serve.http_server import bind_listeners, run_server
from fastchat.web.config import PageConfig, parse_root_path, read_accounts

DEFAULT_PORT = 7860
DEFAULT_API_URL = "http://127.0.0.1:8000"
API_KEY_VARIABLE = "FASTCHAT_API_KEY"
_API_SERVER_PORT = 8000
QUIET_PATHS = ("/assets", "/static", "/page", "/theme.css", "/gradio_api", "/manifest.json", "/favicon.ico")
"""What a browser asks for by itself; the visits are what an operator wants to see."""
_HOSTS = "by which browsers may call the page, such as that of a proxy in front of it"

_REFUSED = (
    ("--share", False, "a share link sends the page through somebody else's tunnel; use --host 0.0.0.0"),
    ("--moderate", False, "it would send every message to another company's server"),
    ("--show-terms-of-use", False, "no terms come with this page"),
    ("--register-api-endpoint-file", True, "give the controller the URL of another OpenAI-compatible server"),
    ("--use-remote-storage", False, "conversations stay in the browser"),
)

_log = structlog.get_logger(__name__)


def create_page_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "gradio_web_server",
        "The page: chat in the browser with the models that an API server serves.",
        epilog="Listens on this machine only; --host 0.0.0.0 opens it to others, and --gradio-auth-path decides to "
        "whom. FastChat's --share, --moderate, --show-terms-of-use, --register-api-endpoint-file and "
        "--use-remote-storage are refused, each with its reason.",
    )
    add_address_flags(parser, port=DEFAULT_PORT)
    parser.add_argument("--api-url", type=flag_type(parse_url), help=f"the API server (default: {DEFAULT_API_URL})")
    parser.add_argument(
        "--controller-url",
        type=flag_type(parse_url),
        help=f"FastChat's flag: without --api-url, the API server is port {_API_SERVER_PORT} of this URL's machine",
    )
    parser.add_argument(
        "--api-key", metavar="KEY", help=f"key for the API server (default: {API_KEY_VARIABLE}, else none)"
    )
    parser.add_argument(
        "--model-list-mode",
        choices=("reload", "once"),
        default="reload",
        help="follow what is served, or keep the first list (default: reload)",
    )
    parser.add_argument(
        "--concurrency-count",
        type=int,
        metavar="N",
        help="answers that may run at once, over all browsers (default: no limit, the scheduler decides)",
    )
    add_log_flag(parser)
    add_allowed_hosts_flag(parser, what=_HOSTS, where="--host")
    _add_exposure_flags(parser)
    parser.add_argument("--expect-models", type=json.loads, default=[], metavar="JSON", help=argparse.SUPPRESS)
    for flag, takes_value, reason in _REFUSED:
        add_refused_flag(parser, flag, reason=reason, takes_value=takes_value)
    return parser


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """The page's flags of `fastchat serve`."""
    parser.add_argument("--no-web", action="store_true", help="do not start the page (default: it is started)")
    parser.add_argument(
        "--web-host", type=flag_type(parse_host), default="localhost", help="address of the page (default: localhost)"
    )
    parser.add_argument(
        "--web-port",
        type=flag_type(parse_port),
        default=DEFAULT_PORT,
        metavar="PORT",
        help=f"port of the page, 0 for any free one (default: {DEFAULT_PORT})",
    )
    add_allowed_hosts_flag(parser, "--web-allowed-hosts", what=_HOSTS, where="--web-host")
    _add_exposure_flags(parser)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the page until a signal ends it; returns the exit code."""
    arguments = create_page_parser().parse_args(argv)
    configure_logging("gradio_web_server", level=log_level(arguments))
    log_arguments(arguments)
    config = page_config(arguments)
    listeners = bind_listeners(arguments.host, arguments.port)
    keep_gradio_quiet()
    from fastchat.web.app import create_web_app  # seconds of imports, and Gradio reads the environment during them

    app = create_web_app(config)
    _say_who_can_reach_it(arguments.host, listeners.url(), config)
    return run_server(app, listeners, quiet_paths=QUIET_PATHS)


def _add_exposure_flags(parser: argparse.ArgumentParser) -> None:
    """Who may use the page, and where others see it."""
    parser.add_argument(
        "--gradio-auth-path",
        type=flag_type(expand_home),
        metavar="FILE",
        help="who may use the page: a file of name:password lines (default: everyone who reaches it)",
    )
    parser.add_argument(
        "--gradio-root-path",
        type=flag_type(parse_root_path),
        default="",
        metavar="PATH",
        help="path below which a proxy shows the page, such as /chat (default: none)",
    )


def page_config(arguments: argparse.Namespace) -> PageConfig:
    """The flags as the page's configuration. Raises `ConfigError`."""
    return PageConfig(
        api_url=_api_url(arguments),
        api_key=arguments.api_key or os.environ.get(API_KEY_VARIABLE) or None,
        accounts=read_accounts(arguments.gradio_auth_path) if arguments.gradio_auth_path else None,
        allowed_hosts=_allowed_hosts(arguments),
        root_path=arguments.gradio_root_path,
        max_answers=arguments.concurrency_count,
        model_list_mode=arguments.model_list_mode,
        expected_models=tuple(arguments.expect_models),
    )


def keep_gradio_quiet() -> None:
    """Nothing calls home: neither Gradio's statistics nor the model hub's."""
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_OFFLINE="1")
    for name in [name for name in os.environ if name.startswith("GRADIO_") and name != "GRADIO_ANALYTICS_ENABLED"]:
        del os.environ[name]  # a variable must not open what a flag closes


def _allowed_hosts(arguments: argparse.Namespace) -> tuple[str, ...] | None:
    """With the name in a whole URL of `--gradio-root-path`, by which browsers call the page too."""
    names, root = allowed_hosts(arguments), arguments.gradio_root_path
    if names is None or root.startswith("/"):
        return names
    public_name = urlsplit(root).hostname
    return names if public_name is None else (*names, public_name)


def _api_url(arguments: argparse.Namespace) -> str:
    if arguments.api_url is not None:
        return str(arguments.api_url)
    if arguments.controller_url is None:
        return DEFAULT_API_URL
    parts = urlsplit(arguments.controller_url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    url = f"{parts.scheme}://{host}:{_API_SERVER_PORT}"
    _log.info("--controller-url leads to the API server of that machine; --api-url names another one", api_url=url)
    return url


def _say_who_can_reach_it(host: str, url: str, config: PageConfig) -> None:
    if is_loopback(host):
        _log.info(f"open {url} on this machine; --host 0.0.0.0 opens the page to your network", api_url=config.api_url)
    elif config.accounts is None:
        _log.warning(
            "NO ACCOUNT IS SET: everyone who can reach this machine may use the page; "
            "name who may with --gradio-auth-path FILE (lines of name:password)"
        )


if __name__ == "__main__":
    run_command(main)
