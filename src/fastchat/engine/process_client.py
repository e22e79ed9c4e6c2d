"""An engine in a spawned process: the default on CUDA, where many streams would fight it for one interpreter.

Torch-free. The child is a command of ours that is given one end of a socket pair (`--engine-fd N`) and calls
`process_server.serve_engine` with it. Weights are loaded there and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence

from fastchat.engine import wire
from fastchat.engine.adapters import AdapterOrder
from fastchat.engine.client import CLOSE_TIMEOUT_S, EngineClient
from fastchat.engine.events import SequenceRequest
from fastchat.errors import CheckpointError, ConfigError, EngineError, FastChatError

logger = logging.getLogger(__name__)

_ERROR_KINDS: dict[str, type[FastChatError]] = {"checkpoint": CheckpointError, "config": ConfigError}


class ProcessEngineClient(EngineClient):
    """Starts `command --engine-fd N` and speaks `wire.py` with it."""

    def __init__(self, command: Sequence[str], *, close_timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        super().__init__()
        self._command = tuple(command)
        self._close_timeout_s = close_timeout_s
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Spawn the child and wait until its model is loaded; what loading raised there is raised here."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                theirs.set_inheritable(True)
                self._process = await asyncio.create_subprocess_exec(
                    *self._command, "--engine-fd", str(theirs.fileno()), pass_fds=(theirs.fileno(),)
                )
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        while (first := await _read_message(reader)) is not None and first[0] == "loading":
            self.load_progress = float(first[1])
        match first:
            case ["ready", limits]:
                self.limits = wire.decode_limits(limits)
            case ["failed", str(kind), str(message)]:
                await self.close()
                raise _error(kind, message)
            case _:
                await self.close()
                raise EngineError("the engine process ended before it was ready; its log has the cause")
        self._failure = None
        # Owned by this client: `close` waits for it.
        self._reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def close(self) -> None:
        """Ask the child to stop after its current step; kill it if it does not, or if it is still loading."""
        if self._process is None:
            return
        self._fail(EngineError("the engine was closed"))
        if self._reading is None:
            await self._kill(self._process)  # nobody reads a "stop" there before the model is loaded
        elif self._process.returncode is None:
            await self._stop(self._process)
        if self._reading is not None:
            await self._reading
        if self._writer is not None:
            self._writer.close()
            with contextlib.suppress(ConnectionError):
                await self._writer.wait_closed()

    async def _stop(self, process: asyncio.subprocess.Process) -> None:
        assert self._writer is not None
        self._writer.write(wire.pack(["stop"]))
        try:
            async with asyncio.timeout(self._close_timeout_s):
                with contextlib.suppress(ConnectionError):
                    await self._writer.drain()
                await process.wait()
        except TimeoutError:
            logger.warning("the engine process does not stop; it is killed process_id=%d", process.pid)
            await self._kill(process)

    async def _kill(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()

    @property
    def process_id(self) -> int | None:
        """The child's process id."""
        return None if self._process is None else self._process.pid

    def _send(self, request: SequenceRequest) -> None:
        assert self._writer is not None
        self._writer.write(wire.pack(["add", wire.encode_request(request)]))

    def _send_abort(self, sequence_id: str) -> None:
        assert self._writer is not None
        self._writer.write(wire.pack(["abort", sequence_id]))

    def _send_order(self, order: AdapterOrder) -> None:
        assert self._writer is not None
        self._writer.write(wire.pack(["adapter", order.number, order.name, order.source]))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        """Deliver the child's events until it ends."""
        try:
            while (message := await _read_message(reader)) is not None:
                match message:
                    case ["step", list(events), stats]:
                        self._deliver([wire.decode_event(event) for event in events], wire.decode_stats(stats))
                    case ["settled", int(number)]:
                        self._settle(number, None)
                    case ["settled", int(number), str(kind), str(reason)]:
                        self._settle(number, _error(kind, reason))
        finally:
            self._fail(EngineError("the engine process died; its log has the cause"))


def _error(kind: str, message: str) -> FastChatError:
    """What the child raised there."""
    return _ERROR_KINDS.get(kind, EngineError)(message)


async def _read_message(reader: asyncio.StreamReader) -> list[wire.Json] | None:
    """The next message, or None when the other side is gone."""
    try:
        header = await reader.readexactly(wire.HEADER.size)
        return wire.unpack(await reader.readexactly(wire.unpack_length(header)))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
