"""A real controller and a real API server around canned workers, all on one event loop in a thread."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, contextmanager

import aiohttp
import orjson
import pytest

from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from tests.gateway.canned_worker import CannedWorker
from tests.gateway.loop_thread import LoopThread

TOKEN = "cluster-token-of-these-tests"


class Cluster:
    """One controller, API servers and canned workers, and a client for them."""

    def __init__(self, thread):
        self.thread = thread
        self._stack = ExitStack()
        app = create_controller_app(ControllerConfig(cluster_token=TOKEN))
        controller = app.state.controller
        self.controller_url = self._stack.enter_context(thread.serve(app, on_stop=controller.stop))
        self.session = thread.run(_create_session())

    def close(self):
        self.thread.run(self.session.close())
        self._stack.close()

    @contextmanager
    def api_server(self, **config):
        """An API server's URL; it has seen the controller's table."""
        config = ApiServerConfig(cluster_token=TOKEN, controller_address=self.controller_url, **config)
        with self.thread.serve(create_api_app(config)) as url:
            yield url

    @contextmanager
    def worker(self, worker_id="w1", models=("tiny",), **acts):
        """A canned worker that is registered while the block runs."""
        worker = CannedWorker(worker_id, models)
        worker.acts.update(acts)
        with (
            self.thread.serve(worker.app) as address,
            self.in_loop(worker.registered(self.controller_url, TOKEN, address)),
        ):
            yield worker

    @contextmanager
    def in_loop(self, context):
        value = self.thread.run(context.__aenter__())
        try:
            yield value
        finally:
            self.thread.run(context.__aexit__(None, None, None))

    def wait_for_models(self, url, *names, headers=None):
        """Until the API server lists exactly these models."""

        async def wait():
            while True:
                async with self.session.get(f"{url}/v1/models", headers=headers) as response:
                    document = orjson.loads(await response.read())
                    if sorted(names) == [card["id"] for card in document.get("data", [])]:
                        return document
                await asyncio.sleep(0.02)

        return self.thread.run(wait())

    def post(self, url, path, document, **options):
        """Status, headers and bytes of an answer."""

        async def post():
            async with self.session.post(url + path, json=document, **options) as response:
                return response.status, response.headers, await response.read()

        return self.thread.run(post())

    def get(self, url, path, method="GET", **options):
        """Status, headers and bytes of an answer."""

        async def get():
            async with self.session.request(method, url + path, **options) as response:
                return response.status, response.headers, await response.read()

        return self.thread.run(get())


async def _create_session():
    return aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=50))


@pytest.fixture(scope="session")
def thread():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def cluster(thread):
    cluster = Cluster(thread)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def api(cluster):
    """The URL of an API server without keys."""
    with cluster.api_server() as url:
        yield url


@pytest.fixture
def worker(cluster, api):
    """One worker of the model `tiny`."""
    with cluster.worker() as worker:
        cluster.wait_for_models(api, "tiny")
        yield worker
    cluster.wait_for_models(api)
