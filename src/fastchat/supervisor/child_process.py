"""One started process and the supervisor's end of its link: when it is ready, why and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fastchat.supervisor.parent_link import ERROR, PARENT_FD_VARIABLE, READY

_MAX_PENDING_BYTES = 64 * 2**10
_LAST_WORDS_LIMIT_S = 1.0
_TERMINAL_SIGNALS = frozenset({signal.SIGINT, signal.SIGHUP})
"""A terminal sends these to the whole process group; the supervisor alone decides what they mean."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended. `exit_code` is negative for a signal; `ready_at` is of the event loop's clock."""

    exit_code: int
    ready_at: float | None
    error: str | None

    def __str__(self) -> str:
        if self.exit_code >= 0:
            return f"exit code {self.exit_code}"
        return signal.Signals(-self.exit_code).name


class ChildProcess:
    """A running process. It ends with this one: its end of the link sees the other end close."""

    def __init__(self, process: asyncio.subprocess.Process, link: _Link) -> None:
        self._process = process
        self._link = link

    def __repr__(self) -> str:
        return f"<ChildProcess {self.pid} exit_code={self._process.returncode} ready_at={self._link.ready_at}>"

    @classmethod
    async def start(cls, command: Sequence[str], environment: Mapping[str, str] | None = None) -> ChildProcess:
        """Start `command`: nothing to read, both outputs on our stderr. Only one call may run at a time."""
        ours, theirs = socket.socketpair()
        with theirs, _terminal_signals_blocked():  # the child inherits the blocked signals
            # Descriptors are closed on exec, so no sibling inherits our end and keeps an orphan from noticing.
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(),),
                env={**(os.environ if environment is None else environment), PARENT_FD_VARIABLE: str(theirs.fileno())},
            )
        _, link = await asyncio.get_running_loop().create_connection(_Link, sock=ours)
        return cls(process, link)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def is_ready(self) -> bool:
        """Whether it has ever said that it answers requests."""
        return self._link.ready_at is not None

    @property
    def is_serving(self) -> bool:
        """Whether it is ready and has not ended since."""
        return self.is_ready and self._process.returncode is None

    async def wait_settled(self) -> bool:
        """Wait until it is ready or has closed its link, which its end does too; whether it is ready."""
        await self._link.settled.wait()
        return self.is_ready

    async def wait(self) -> Ended:
        """Wait for its end, and for the last words that are still under way."""
        exit_code = await self._process.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._link.closed.wait(), _LAST_WORDS_LIMIT_S)
        self._link.close()
        return Ended(exit_code, self._link.ready_at, self._link.error)

    async def stop(self, limit_s: float) -> bool:
        """Ask it to end, and force it after `limit_s` seconds; whether it ended by itself."""
        self.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), limit_s)
        except TimeoutError:
            self.kill()
            await self._process.wait()
            return False
        return True

    def terminate(self) -> None:
        """Ask it to end in order."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    def kill(self) -> None:
        """End it at once."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()


class _Link(asyncio.Protocol):
    """Reads what the process says."""

    def __init__(self) -> None:
        self.ready_at: float | None = None
        self.error: str | None = None
        self.settled = asyncio.Event()
        self.closed = asyncio.Event()
        self._pending = b""
        self._transport: asyncio.BaseTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *lines, self._pending = (self._pending + data).split(b"\n")
        self._pending = self._pending[:_MAX_PENDING_BYTES]
        for line in lines:
            self._take(line.decode(errors="replace"))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio calls with it
        self.settled.set()
        self.closed.set()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _take(self, line: str) -> None:
        if line == READY:
            self.ready_at = asyncio.get_running_loop().time()
            self.settled.set()
        elif line.startswith(ERROR):
            self.error = line.removeprefix(ERROR)


@contextlib.contextmanager
def _terminal_signals_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TERMINAL_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
