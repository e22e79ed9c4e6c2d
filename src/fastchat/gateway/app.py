"""The API server as an app: what it is made of, in which order a request passes it, and how it starts and ends.

access log -> CORS (where asked for) -> request id and errors -> browsers -> key -> routes -> relay -> worker
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware

from fastchat.api.http_edge import BearerGuard, install_error_handlers
from fastchat.cluster.dispatch import Dispatcher
from fastchat.cluster.watcher import TableWatcher
from fastchat.gateway.browser_guard import BrowserGuard
from fastchat.gateway.chat_door import ChatDoor
from fastchat.gateway.config import ApiServerConfig
from fastchat.gateway.exchange import Exchanges
from fastchat.gateway.key_watch import KeyWatch
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.model_control import WorkerLine
from fastchat.gateway.mounted import MountedRoutes
from fastchat.gateway.relay import Relay
from fastchat.gateway.routes import OPEN_PATHS, ApiRoutes
from fastchat.gateway.worker_http import WorkerHttp
from fastchat.ops.keys import ApiKeys


def create_api_app(config: ApiServerConfig, mounted: Sequence[MountedRoutes] = ()) -> Starlette:
    """An API server that watches `config.controller_address` while it runs; `mounted` parts live and end with it."""
    keys = ApiKeys(config.api_keys, page_key=config.page_key, tenant_secret=config.cluster_token)
    watcher = TableWatcher(controller_address=config.controller_address, token=config.cluster_token)
    table = LiveTable(watcher, config.controller_address, expected_models=config.expected_models)
    dispatcher = Dispatcher()
    routes = ApiRoutes(table=table, dispatcher=dispatcher, keys=keys, mounted=mounted)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        exchanges = Exchanges()
        async with AsyncExitStack() as running:
            if config.key_store_path is not None:
                await running.enter_async_context(KeyWatch(keys, config.key_store_path).keep_open())
            http = await running.enter_async_context(WorkerHttp())
            await running.enter_async_context(watcher.keep_open())
            await running.enter_async_context(_followed(table, exchanges))
            routes.control.line = WorkerLine(http, exchanges, config.cluster_token)
            routes.relay = Relay(
                http=http,
                table=table,
                dispatcher=dispatcher,
                exchanges=exchanges,
                cluster_token=config.cluster_token,
                on_retry=routes.metrics.observe_retry,
            )
            door = ChatDoor(relay=routes.relay, table=table, keys=keys, metrics=routes.metrics)
            for part in mounted:
                await running.enter_async_context(part.keep_open(door))
            yield

    app = Starlette(routes=routes.build(), lifespan=lifespan)
    _add_middleware(app, config, keys)
    return app


def _add_middleware(app: Starlette, config: ApiServerConfig, keys: ApiKeys) -> None:
    """From the inside to the outside: what is added last sees a request first."""
    app.add_middleware(BearerGuard, is_allowed=keys.is_allowed, open_paths=OPEN_PATHS, is_open=lambda: keys.is_open)
    app.add_middleware(
        BrowserGuard,
        allowed_hosts=config.allowed_hosts,
        allowed_origins=config.cors.allowed_origins,
        is_open=lambda: keys.is_open,
    )
    install_error_handlers(app)
    if config.cors.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_credentials=config.cors.allow_credentials,
            allow_origins=config.cors.allowed_origins,
            allow_methods=config.cors.allowed_methods,
            allow_headers=config.cors.allowed_headers,
        )


@asynccontextmanager
async def _followed(table: LiveTable, exchanges: Exchanges) -> AsyncIterator[None]:
    """While the block runs, what is under way hears of every change of the table."""
    task = asyncio.get_running_loop().create_task(table.follow(exchanges.heed))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
