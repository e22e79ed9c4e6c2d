"""The API server's HTTP client towards workers: who connects where, and which connection a request gets.

It does what a relay needs and no more: no redirect is followed, no proxy asked, no cookie kept. A general client took
half of the time that a relayed answer cost.

Connections to one address are made a few at a time. Whoever waits for one waits without a clock: after a pause
hundreds of requests come at once, and all of them would be late together.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Mapping
from types import TracebackType

from yarl import URL

from fastchat.cluster.dial_rules import GuardedResolver
from fastchat.gateway.worker_connection import Answer, Connection

CONNECT_TIMEOUT_S = 3.0
IDLE_S = 15.0
"""How long a connection is kept for the next request; our servers keep theirs five times as long."""
MAX_CONNECTING = 32
"""Connections to one address that are being made at a time."""
_PROBES = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
"""A machine that is gone without a word is noticed after half a minute, also where no table tells of it: an answer may
take for ever, but the machine that computes it is there. Seconds, the number of probes, and the milliseconds for what
was sent and is not acknowledged, behind which nothing is probed; where the system has them.
"""


class ConnectError(OSError):
    """There is no connection: nobody has seen anything of the request."""


class WorkerHttp:
    """The connections of one process to all workers; an async context, which closes them all at its end."""

    def __init__(self, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._resolver = GuardedResolver()
        self._lines: dict[str, _Line] = {}

    def __repr__(self) -> str:
        return f"<WorkerHttp {self._lines!r}>"

    async def __aenter__(self) -> WorkerHttp:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for line in self._lines.values():
            line.close()
        await self._resolver.close()

    async def ask(
        self, address: str, path: str, headers: Mapping[str, str], body: bytes = b"", *, method: str = "POST"
    ) -> Answer:
        """Send a request to the server at `address` and wait for its answer's head.

        Raises `ConnectError`, and another `OSError` where the request may have begun.
        """
        line = self._lines.get(address)
        if line is None:
            # Workers come back under new addresses; those that are gone are forgotten.
            self._lines = {known: each for known, each in self._lines.items() if each.is_used}
            line = self._lines[address] = _Line(_parsed(address), self._resolver, self._connect_timeout_s)
        head = line.head(method, path, headers, len(body))
        connection = line.free_connection() or await line.connect()
        return await connection.ask(head, body, is_last=headers.get("connection") == "close")


class _Line:
    """All connections to one address."""

    def __init__(self, url: URL, resolver: GuardedResolver, connect_timeout_s: float) -> None:
        self._host, self._port = url.raw_host or "", url.port or 0
        self._path = url.raw_path.rstrip("/")
        self._host_header = url.host_port_subcomponent
        self._resolver = resolver
        self._connect_timeout_s = connect_timeout_s
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._fixed_addresses: list[str] = []
        self._all: set[Connection] = set()
        self._free: dict[Connection, float] = {}  # since when; the newest is last
        self._turns = asyncio.Semaphore(MAX_CONNECTING)
        self._num_connecting = 0
        self._failure: BaseException | None = None  # of the last attempt to connect, if it failed

    @property
    def is_used(self) -> bool:
        """Whether there is a connection, or somebody waits for one."""
        return bool(self._all) or self._num_connecting > 0

    def __repr__(self) -> str:
        return f"<_Line {self._host_header} open={len(self._all)} free={len(self._free)}>"

    def head(self, method: str, path: str, headers: Mapping[str, str], num_bytes: int) -> bytes:
        """A request's head."""
        lines = [f"{method} {self._path}{path} HTTP/1.1", f"host: {self._host_header}", f"content-length: {num_bytes}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        text = "\r\n".join(lines)
        assert text.count("\n") == len(lines) - 1, "no header of ours has a line end"
        return f"{text}\r\n\r\n".encode("latin-1")

    def free_connection(self) -> Connection | None:
        """The one that was used last, taken out; None where there is none."""
        now = time.monotonic()
        while self._free:
            connection, since = self._free.popitem()
            if connection.is_open and now - since <= IDLE_S:
                return connection
            connection.abort()
        return None

    async def connect(self) -> Connection:
        """A new connection, when it is its turn. Raises `ConnectError`.

        Where nobody can connect, those who waited for their turn meanwhile fail with the one who tried.
        """
        self._num_connecting += 1
        try:
            return await self._connect_in_turn()
        finally:
            self._num_connecting -= 1

    def close(self) -> None:
        """Close all connections."""
        for connection in list(self._all):
            connection.abort()

    async def _connect_in_turn(self) -> Connection:
        failed_before = self._failure
        async with self._turns:
            if self._failure is not None and self._failure is not failed_before:
                raise ConnectError(f"{self._host_header} cannot be reached") from self._failure
            try:
                connection = await self._open()
            except (OSError, UnicodeError) as error:
                self._failure = error
                raise ConnectError(f"{self._host_header} cannot be reached") from error
            self._failure = None
            return connection

    async def _open(self) -> Connection:
        """To the first address that lets us; of several each has its share of the time."""
        addresses = await self._addresses()
        failure: OSError = TimeoutError()
        for address in addresses:
            try:
                async with asyncio.timeout(self._connect_timeout_s / len(addresses)):
                    transport, connection = await asyncio.get_running_loop().create_connection(
                        lambda: Connection(self._keep, self._forget),
                        address,
                        self._port,
                        ssl=self._tls,
                        server_hostname=self._host if self._tls else None,
                    )
            except OSError as error:  # TimeoutError is one
                failure = error
            else:
                _probe(transport.get_extra_info("socket"))
                self._all.add(connection)
                return connection
        raise failure

    async def _addresses(self) -> list[str]:
        """What the name leads to now; an address leads to itself, if it is one that may be dialled."""
        if self._fixed_addresses:
            return self._fixed_addresses
        async with asyncio.timeout(self._connect_timeout_s):
            found = await self._resolver.resolve(self._host, self._port, socket.AF_UNSPEC)
        addresses = [each["host"] for each in found]
        if addresses == [self._host]:
            self._fixed_addresses = addresses
        return addresses

    def _keep(self, connection: Connection) -> None:
        self._free[connection] = time.monotonic()

    def _forget(self, connection: Connection) -> None:
        self._all.discard(connection)
        self._free.pop(connection, None)


def _probe(connected: socket.socket) -> None:
    """Let the system ask a silent peer whether it is still there."""
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _PROBES.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _parsed(address: str) -> URL:
    """An address of the table. Raises `ConnectError` for a name that nothing can have."""
    try:
        url = URL(address)
    except ValueError as error:
        raise ConnectError(f"{address} is no address") from error
    if url.raw_host is None or url.port is None:
        raise ConnectError(f"{address} is no address")
    return url
