"""The child's side of an engine in its own process: makes the engine, runs it, speaks `wire.py` on one socket.

The main thread runs the engine; a second one reads commands; a third shows signs of life during long steps. When the
parent is gone the socket ends, and so does the engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import replace

from fastchat.engine import wire
from fastchat.engine.adapters import AdapterOrder
from fastchat.engine.client import CLOSE_TIMEOUT_S
from fastchat.engine.engine import Engine
from fastchat.engine.engine_loop import Abort, EngineLoop, Stop
from fastchat.engine.events import EngineStats, SequenceEvent
from fastchat.errors import CheckpointError, ConfigError, FastChatError

logger = logging.getLogger(__name__)

_SIGN_OF_LIFE_S = 0.5


def serve_engine(
    connection: socket.socket, make_engine: Callable[[], Engine], *, close_timeout_s: float = CLOSE_TIMEOUT_S
) -> None:
    """Serve one engine until the parent says stop or goes away. Failing to make the engine is told to the parent.

    A step that goes on for longer than `close_timeout_s` after that ends with the process.
    """
    try:
        engine = make_engine()
    except FastChatError as error:
        connection.sendall(wire.pack(["failed", _kind(error), error.message]))
        return
    except Exception:
        logger.exception("the model could not be loaded")
        connection.sendall(wire.pack(["failed", "engine", "the model could not be loaded; the log has the cause"]))
        raise
    _EngineServer(connection, engine, close_timeout_s).run()


class _EngineServer:
    def __init__(self, connection: socket.socket, engine: Engine, close_timeout_s: float) -> None:
        self._connection = connection
        self._engine = engine
        self._close_timeout_s = close_timeout_s
        self._loop = EngineLoop(engine, self._emit, settle=self._note_settled)
        self._last_stats = engine.stats
        self._send_lock = threading.RLock()
        self._has_ended = threading.Event()

    def run(self) -> None:
        self._send(["ready", wire.encode_limits(self._engine.limits)])
        reader = threading.Thread(target=self._read_commands, name="engine-commands", daemon=True)
        life = threading.Thread(target=self._show_life, name="engine-life", daemon=True)
        reader.start()
        life.start()
        try:
            self._loop.run()
        finally:
            self._has_ended.set()
            life.join()

    def _emit(self, events: list[SequenceEvent], stats: EngineStats) -> None:
        with self._send_lock:
            self._last_stats = stats
            self._send(["step", [wire.encode_event(event) for event in events], wire.encode_stats(stats)])

    def _note_settled(self, number: int, failure: FastChatError | None) -> None:
        self._send(["settled", number, *([] if failure is None else [_kind(failure), failure.message])])

    def _send(self, message: list[wire.Json]) -> None:
        with self._send_lock, contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the reader sees the end
            self._connection.sendall(wire.pack(message))

    def _show_life(self) -> None:
        while not self._has_ended.wait(_SIGN_OF_LIFE_S):
            with self._send_lock:  # what is told last must be the latest
                stats = replace(self._last_stats, progress=self._engine.progress)
                self._send(["step", [], wire.encode_stats(stats)])

    def _read_commands(self) -> None:
        try:
            with self._connection.makefile("rb") as stream:
                while header := stream.read(wire.HEADER.size):
                    match wire.unpack(stream.read(wire.unpack_length(header))):
                        case ["add", request]:
                            self._loop.inbox.put(wire.decode_request(request))
                        case ["abort", str(sequence_id)]:
                            self._loop.inbox.put(Abort(sequence_id))
                        case ["adapter", int(number), str(name), str(source)]:
                            self._loop.inbox.put(AdapterOrder(number, name, source))
                        case ["stop"]:
                            return
        finally:
            self._loop.inbox.put(Stop())
            if not self._has_ended.wait(self._close_timeout_s):
                logger.warning("the engine does not stop; its process ends")
                os._exit(1)  # a step that hangs would keep the device's memory for ever: nobody may be left to kill us


def _kind(error: FastChatError) -> str:
    """How the parent should raise it again."""
    if isinstance(error, CheckpointError):
        return "checkpoint"
    return "config" if isinstance(error, ConfigError) else "engine"
