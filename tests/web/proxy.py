"""A proxy that shows a server below a path, as nginx does with `location /chat/ { proxy_pass http://server/; }`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

PER_HOP = {"host", "connection", "transfer-encoding", "content-length"}


@contextmanager
def below_path(path: str, server_url: str) -> Iterator[str]:
    """The URL of the proxy's own root, for as long as the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    session, runner, url = asyncio.run_coroutine_threadsafe(_start(path, server_url), loop).result(60)
    try:
        yield url
    finally:
        asyncio.run_coroutine_threadsafe(_stop(session, runner), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(60)
        loop.close()


async def _start(path: str, server_url: str) -> tuple[aiohttp.ClientSession, web.AppRunner, str]:
    session = aiohttp.ClientSession(auto_decompress=False)

    async def pass_on(request: web.Request) -> web.StreamResponse:
        headers = {name: value for name, value in request.headers.items() if name.lower() not in PER_HOP}
        headers |= {"Host": request.host, "X-Forwarded-Proto": "http", "X-Forwarded-Host": request.host}
        rest = request.rel_url.raw_path_qs.removeprefix(path)
        body = await request.read()
        async with session.request(request.method, server_url + rest, headers=headers, data=body) as answer:
            kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in PER_HOP]
            response = web.StreamResponse(status=answer.status, headers=kept)
            await response.prepare(request)
            async for piece in answer.content.iter_any():
                await response.write(piece)
            return response

    app = web.Application(client_max_size=2**20)
    app.router.add_route("*", f"{path}/{{rest:.*}}", pass_on)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    return session, runner, f"http://127.0.0.1:{runner.addresses[0][1]}"


async def _stop(session: aiohttp.ClientSession, runner: web.AppRunner) -> None:
    await runner.cleanup()
    rest = asyncio.all_tasks() - {asyncio.current_task()}  # streams that a browser left
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await session.close()
