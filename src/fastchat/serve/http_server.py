"""uvicorn as every process of ours runs it: bound before anything else, an orderly end, an honest exit code."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Generator
from dataclasses import dataclass
from types import FrameType

import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fastchat.config import TlsFiles, internal_url
from fastchat.errors import ConfigError, FastChatError, UnavailableError
from fastchat.ops.access_log import QUIET_PATHS, AccessLog
from fastchat.serve.arguments import DEFAULT_DRAIN_S, EXIT_FAILURE, EXIT_INTERRUPTED
from fastchat.serve.http_protocol import LimitedHttpProtocol
from fastchat.serve.posture import harden_process
from fastchat.supervisor.parent_link import tell_ready

KEEP_ALIVE_S = 75
"""Longer than the 15 s that aiohttp keeps an idle connection, so that a reused one is never just being closed."""
MAX_WEBSOCKET_MESSAGE_BYTES = 4 * 2**20

_logger = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, slots=True)
class Listeners:
    """Bound sockets of one host and one port, not yet listening."""

    host: str
    port: int
    sockets: tuple[socket.socket, ...]

    def url(self, *, tls: bool = False) -> str:
        """How other processes of this machine reach them."""
        return internal_url(self.host, self.port, tls=tls)


def bind_listeners(host: str, port: int) -> Listeners:
    """Bind `host:port` now, so that a taken port is told before a model is loaded.

    `localhost` binds 127.0.0.1, and ::1 where the machine has it. Port 0 takes any free port, on the first address
    only. Raises `ConfigError` for an address that is not this machine's and `UnavailableError` for a port in use.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: the name has no address here; try --host 0.0.0.0.") from error
    # IPv4 first: port 0 then means a port of 127.0.0.1, the address that internal URLs name.
    addresses = sorted({(family, address) for family, _, _, _, address in found}, key=lambda item: item[0])
    sockets: list[socket.socket] = []
    for family, address in addresses if port else addresses[:1]:
        listener = _bind(
            family, (str(address[0]), port), host, is_last_chance=not sockets and family == addresses[-1][0]
        )
        if listener is not None:
            sockets.append(listener)
    return Listeners(host, sockets[0].getsockname()[1], tuple(sockets))


def run_server(
    app: ASGIApp,
    listeners: Listeners,
    *,
    tls: TlsFiles | None = None,
    on_stop: Callable[[], Awaitable[None]] | None = None,
    has_websockets: bool = True,
    drain_s: int = DEFAULT_DRAIN_S,
    quiet_paths: Collection[str] = QUIET_PATHS,
) -> int:
    """Serve until a signal ends it; returns the exit code.

    `on_stop` is awaited when the first signal arrives, before connections are asked to close: there a process ends its
    endless streams and says goodbye. What is in flight may then go on for `drain_s` seconds. An error on purpose in
    the app's start-up is raised here. Without `has_websockets` an upgrade to one is not made.
    """
    harden_process()
    guarded = _StartUpGuard(AccessLog(app, quiet_paths))
    config = uvicorn.Config(
        guarded,
        host=listeners.host,
        port=listeners.port,
        http=LimitedHttpProtocol,
        ws="websockets-sansio" if has_websockets else "none",
        ws_max_size=MAX_WEBSOCKET_MESSAGE_BYTES,
        ws_per_message_deflate=False,
        lifespan="on",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=drain_s,
        ssl_keyfile=tls.keyfile if tls else None,
        ssl_certfile=tls.certfile if tls else None,
    )
    server = _Server(config, listeners, guarded, on_stop)
    try:
        server.run(sockets=list(listeners.sockets))
    except SystemExit:  # uvicorn's way to say that start-up failed; the log has the cause
        if guarded.error is not None:
            raise guarded.error from None
        return 0 if guarded.was_cancelled else EXIT_FAILURE
    return EXIT_INTERRUPTED if server.force_exit else 0


class _Server(uvicorn.Server):
    """Says where it runs although it is given sockets, and ends without raising the signal again."""

    def __init__(
        self,
        config: uvicorn.Config,
        listeners: Listeners,
        start_up: _StartUpGuard,
        on_stop: Callable[[], Awaitable[None]] | None,
    ) -> None:
        super().__init__(config)
        self._listeners = listeners
        self._start_up = start_up
        self._on_stop = on_stop
        self._event_loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._start_up.cancel)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._event_loop = asyncio.get_running_loop()
        if self.should_exit:  # the signal came before there was anything to cancel
            self._start_up.cancel()
        try:
            await super().startup(sockets=sockets)
        except OSError as error:
            # Another process bound the same port, was quicker to listen, and only now it shows.
            await self.lifespan.shutdown()
            raise _port_error(error, self._listeners.host, self._listeners.port) from error
        if self.started:
            scheme = "https" if self.config.is_ssl else "http"
            host = f"[{self._listeners.host}]" if ":" in self._listeners.host else self._listeners.host
            _logger.info("Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", scheme, host, self._listeners.port)
            tell_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._on_stop is not None:
            await self._on_stop()
        await super().shutdown(sockets=sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


class _StartUpGuard:
    """Keeps an error on purpose of the app's start-up, so that it ends as one line and not as a traceback.

    A start-up may take minutes (a model is loaded); `cancel` ends one that is still under way.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._starting: asyncio.Task[None] | None = None
        self._has_settled = False
        self.error: FastChatError | None = None
        self.was_cancelled = False

    def cancel(self) -> None:
        """End the start-up, if it is under way or has yet to begin."""
        if not self._has_settled and not self.was_cancelled:
            self.was_cancelled = True
            if self._starting is not None:
                self._starting.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return

        failures: list[Message] = []

        async def send_or_keep(message: Message) -> None:
            self._has_settled = True
            if message["type"] == "lifespan.startup.failed":
                failures.append(message)  # held back until we know whether the error was on purpose
            else:
                await send(message)

        self._starting = asyncio.current_task()
        try:
            if self.was_cancelled:
                raise asyncio.CancelledError  # the signal was quicker  # noqa: TRY301 - one way out for both
            await self._app(scope, receive, send_or_keep)
        except FastChatError as error:
            self.error = error
            failures = [{"type": "lifespan.startup.failed", "message": ""}]
        except asyncio.CancelledError:
            if not self.was_cancelled:
                raise
            failures = [{"type": "lifespan.startup.failed", "message": ""}]
        finally:
            for message in failures:
                await send(message)


def _bind(family: int, address: tuple[str, int], host: str, *, is_last_chance: bool) -> socket.socket | None:
    """A bound socket, or None for an address that this machine lacks while others of the name remain."""
    # The protocol is named because asyncio turns Nagle's delay off only where it is.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and not is_last_chance:
            return None
        raise _port_error(error, host, address[1]) from error
    return listener


def _port_error(error: OSError, host: str, port: int) -> FastChatError:
    if error.errno == errno.EADDRINUSE:
        return UnavailableError(f"port {port} of {host} is in use; stop what listens there or give another --port.")
    if error.errno == errno.EADDRNOTAVAIL:
        return ConfigError(
            f"cannot listen on {host}: no interface of this machine has that address; "
            "use --host 0.0.0.0 for all of them, or the address that `ip addr` shows."
        )
    return ConfigError(f"cannot listen on {host}:{port}: {error.strerror}.")
