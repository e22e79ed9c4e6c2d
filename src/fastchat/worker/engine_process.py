"""`python -m fastchat.worker.engine_process`: one engine in its own process, started by a worker and by nobody else.

It loads the model, serves it on the socket it inherited, and ends when the worker does.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from fastchat.ops.logs import configure_logging

if TYPE_CHECKING:
    from fastchat.worker.engine_factory import EnginePlan


def engine_command(plan: EnginePlan) -> list[str]:
    """The command line for `ProcessEngineClient`. The engine logs what the process that asks for it logs."""
    level = logging.getLevelName(logging.getLogger().level)
    return [sys.executable, "-m", "fastchat.worker.engine_process", "--plan", plan.to_json(), "--log-level", level]


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the worker says stop or goes away."""
    parser = argparse.ArgumentParser(prog="python3 -m fastchat.worker.engine_process", description=__doc__)
    parser.add_argument("--plan", required=True, help="what to load, as JSON")
    parser.add_argument("--engine-fd", required=True, type=int, help="the inherited socket's file descriptor")
    parser.add_argument("--log-level", required=True, help="the worker's")
    arguments = parser.parse_args(argv)
    # A Ctrl-C reaches the whole group; the worker decides when its engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging("engine", level=arguments.log_level)
    with socket.socket(fileno=arguments.engine_fd) as connection:
        threading.Thread(target=_end_with_worker, args=(connection,), name="worker-watch", daemon=True).start()
        # torch takes seconds to import: a worker that dies meanwhile is noticed already.
        from fastchat.engine import wire
        from fastchat.engine.process_server import serve_engine
        from fastchat.worker.engine_factory import EnginePlan, make_engine

        plan = EnginePlan.from_json(arguments.plan)

        def tell(progress: float) -> None:
            with suppress(ConnectionError):  # a worker that is gone ends us by itself
                connection.sendall(wire.pack(["loading", progress]))

        serve_engine(connection, lambda: make_engine(plan, tell))
    return 0


def _end_with_worker(connection: socket.socket) -> None:
    """Nobody reads the socket until the model is loaded, which takes minutes; a worker that dies then ends us too.

    Looks until the first byte comes, and takes none: by then the engine's own reader is there.
    """
    try:
        is_gone = not connection.recv(1, socket.MSG_PEEK)
    except OSError:
        is_gone = True
    if is_gone:
        os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
