"""An event loop in a thread that serves apps on free ports, for tests that talk to them from outside."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import contextmanager

import uvicorn


class LoopThread:
    """Runs coroutines and servers until it is closed."""

    def __init__(self, loop=None):
        self.loop = loop or asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine, limit_s=60):
        """The coroutine's result; it runs in the loop's thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(limit_s)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    @contextmanager
    def serve(self, app, port=0, *, on_stop=None, http="auto", keep_alive_s=75):
        """The URL of `app` while the block runs; its lifespan runs too. `on_stop` ends its endless streams."""
        # With the protocol named, or asyncio leaves Nagle on and every answer takes 40 ms.
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            http=http,
            ws="websockets-sansio",
            timeout_graceful_shutdown=3,
            timeout_keep_alive=keep_alive_s,
        )
        server = Server(config, on_stop)
        serving = asyncio.run_coroutine_threadsafe(server.serve([listener]), self.loop)
        self.run(server.started_event.wait())
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            serving.result(60)
            listener.close()


class Server(uvicorn.Server):
    """A server that says when it has started, and leaves signals alone."""

    def __init__(self, config, on_stop):
        super().__init__(config)
        self._on_stop = on_stop
        self.started_event = asyncio.Event()

    async def startup(self, sockets=None):
        await super().startup(sockets=sockets)
        assert self.started
        self.started_event.set()

    async def shutdown(self, sockets=None):
        if self._on_stop is not None:
            await self._on_stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self):
        yield
