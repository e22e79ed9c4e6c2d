"""The worker's ASGI app: its routes behind the cluster token, and its life in the app's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette

from fastchat.api.http_edge import BearerGuard, install_error_handlers
from fastchat.cluster.contract import REQUEST_ID_HEADER
from fastchat.cluster.token import TOKEN_HINT, is_cluster_token
from fastchat.worker.config import WorkerConfig
from fastchat.worker.life_cycle import WorkerRuntime
from fastchat.worker.routes import OPEN_PATHS, WorkerRoutes


def create_worker_app(config: WorkerConfig, *, end_process: Callable[[], None] = lambda: None) -> Starlette:
    """An app that loads its models when it starts; `app.state.runtime` is the `WorkerRuntime`.

    `end_process` is called when it can serve no more, see there.
    """
    runtime = WorkerRuntime(config, end_process=end_process)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with runtime.running():
            yield

    app = Starlette(routes=WorkerRoutes(runtime).routes(), lifespan=lifespan)
    app.state.runtime = runtime
    app.add_middleware(
        BearerGuard,
        is_allowed=lambda key: is_cluster_token(config.cluster_token, key),
        open_paths=OPEN_PATHS,
        hint=f"Between processes {TOKEN_HINT}.",
    )
    install_error_handlers(app, request_id_header=REQUEST_ID_HEADER)
    return app
