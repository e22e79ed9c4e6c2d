"""The controller's HTTP skin around the table: workers connect, API servers watch, FastChat's endpoints answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI, Request, Response, WebSocket

from fastchat.api.http_edge import BearerGuard, EventStreamResponse, install_error_handlers
from fastchat.cluster.contract import CONNECT_PATH, WATCH_PATH
from fastchat.cluster.dial_rules import DialRules, GuardedResolver
from fastchat.cluster.feed import TableFeed
from fastchat.cluster.table import WorkerTable
from fastchat.cluster.token import TOKEN_HINT, is_cluster_token
from fastchat.cluster.usage import UsageLedger
from fastchat.errors import ConfigError
from fastchat.gateway.controller_connection import Reception
from fastchat.gateway.controller_legacy import LegacyEndpoints, legacy_router
from fastchat.ops.metrics import METRICS_CONTENT_TYPE, ClusterCondition, ControllerMetrics

OPEN_PATHS = ("/livez", "/health")
SWEEP_INTERVAL_S = 0.5
"""How often the states are judged when nothing happens: a worker that falls silent makes no event."""


@dataclass(frozen=True, slots=True)
class ControllerConfig:
    """What a controller is made of.

    `usage_path` None keeps usage in memory; `allowed_workers` are networks and names beside the usual ones, see
    `DialRules`; the rest is in seconds.
    """

    cluster_token: str = field(repr=False)
    usage_path: Path | None = None
    allowed_workers: tuple[str, ...] = ()
    hang_after_s: float = 30.0
    silent_after_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.cluster_token:
            raise ConfigError("the controller needs a cluster token.")
        if self.hang_after_s <= 0 or self.silent_after_s <= 0:
            raise ConfigError("hang_after_s and silent_after_s must be above 0.")


class Controller:
    """The living parts of one controller: table, ledger, the feeds of its watchers."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.table = WorkerTable(time.monotonic, hang_after_s=config.hang_after_s, silent_after_s=config.silent_after_s)
        self.ledger = UsageLedger(config.usage_path)
        self.ledger_turn = asyncio.Lock()
        self.rules = DialRules(config.allowed_workers)
        self.metrics = ControllerMetrics()
        self._feeds: set[TableFeed] = set()
        self._session: aiohttp.ClientSession | None = None

    @property
    def session(self) -> aiohttp.ClientSession:
        """The one HTTP client, there while the controller runs."""
        assert self._session is not None
        return self._session

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """While the block runs, the controller lives."""
        async with aiohttp.ClientSession(
            trust_env=False, connector=aiohttp.TCPConnector(resolver=GuardedResolver())
        ) as self._session:
            sweeper = asyncio.get_running_loop().create_task(self._sweep_forever())
            try:
                yield
            finally:
                sweeper.cancel()
                with suppress(asyncio.CancelledError):
                    await sweeper
                self.ledger.close()

    async def stop(self) -> None:
        """End the watchers' streams; called before the server closes its connections."""
        for feed in self._feeds:
            feed.close()

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The table as JSON lines."""
        with TableFeed(self.table) as feed:
            self._feeds.add(feed)
            try:
                while (snapshot := await feed.next_snapshot()) is not None:
                    yield snapshot.model_dump_json().encode() + b"\n"
            finally:
                self._feeds.discard(feed)

    def render_metrics(self) -> bytes:
        """The metrics with the table's present condition."""
        states = [worker.state for worker in self.table.snapshot().workers]
        condition = ClusterCondition(
            num_ready=states.count("ready"),
            num_draining=states.count("draining"),
            num_hung=states.count("hung"),
            num_records=self.ledger.num_added,
        )
        self.metrics.set_condition(condition)
        return self.metrics.render()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self.table.sweep()


class JsonLinesResponse(EventStreamResponse):
    """An endless stream of JSON lines."""

    media_type = "application/x-ndjson"


def create_controller_app(config: ControllerConfig) -> FastAPI:
    """The controller as an ASGI app. `app.state.controller` is its `Controller`, for who shares the process."""
    controller = Controller(config)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with controller.run():
            yield

    app = FastAPI(title="FastChat controller", openapi_url=None, lifespan=lifespan)
    app.state.controller = controller
    _add_routes(app, controller)
    app.include_router(legacy_router(LegacyEndpoints(controller.table, controller.rules, lambda: controller.session)))
    app.add_middleware(
        BearerGuard,
        is_allowed=lambda bearer: is_cluster_token(config.cluster_token, bearer),
        open_paths=OPEN_PATHS,
        hint=f"Between processes {TOKEN_HINT}.",
    )
    install_error_handlers(app)
    return app


def _add_routes(app: FastAPI, controller: Controller) -> None:
    @app.websocket(CONNECT_PATH)
    async def connect(socket: WebSocket) -> None:
        reception = Reception(
            controller.table, controller.ledger, controller.ledger_turn, controller.session, controller.rules
        )
        await reception.serve(socket)

    @app.get(WATCH_PATH)
    async def watch(request: Request) -> Response:  # noqa: ARG001 - FastAPI calls with it
        return JsonLinesResponse(controller.watch())

    @app.get("/livez")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(controller.render_metrics(), media_type=METRICS_CONTENT_TYPE)

    @app.get("/cluster/usage")
    async def usage() -> dict[str, list[dict[str, Any]]]:  # Any: names and counts
        totals = await asyncio.to_thread(controller.ledger.totals)
        return {"totals": [asdict(total) for total in totals]}
