"""What other parts of the API server's process ask goes the way of every request, and is counted like every request."""

from __future__ import annotations

import asyncio
from contextlib import aclosing, asynccontextmanager

import pytest

from fastchat.errors import ModelNotFoundError
from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig
from fastchat.gateway.mounted import MountedRoutes
from tests.gateway.conftest import TOKEN

CHAT = {"messages": [], "stream": True}


@pytest.fixture(scope="module")
def mounted(cluster):
    """The URL of an API server, and the door that a part of it was given."""
    doors = []

    @asynccontextmanager
    async def keep_open(door):
        doors.append(door)
        yield

    config = ApiServerConfig(cluster_token=TOKEN, controller_address=cluster.controller_url)
    with cluster.thread.serve(create_api_app(config, (MountedRoutes((), keep_open),))) as url:
        yield url, doors[0]


def counted(cluster, url, status):
    """How many requests ended so, for any model."""
    lines = cluster.get(url, "/metrics")[2].decode().splitlines()
    ended = [
        line for line in lines if line.startswith("fastchat_http_requests_total{") and f'status="{status}"' in line
    ]
    return sum(float(line.rpartition(" ")[2]) for line in ended)


def test_how_it_ended_is_counted_as_it_was(cluster, mounted):
    """An answer, a model that is not there, and one whose asker has left: none is a worker's failure."""
    url, door = mounted

    async def ask(model, **options):
        events = await door.open_chat(CHAT | {"model": model} | options, tenant="", is_secret=False)
        async with aclosing(events):
            return b"".join([each async for each in events])

    async def ask_and_leave(worker):
        asking = asyncio.ensure_future(ask("tiny", act="hang"))
        await (await worker.wait_for_request()).began.wait()
        asking.cancel()
        await asyncio.wait({asking})

    with cluster.worker() as worker:
        cluster.wait_for_models(url, "tiny")
        cluster.thread.run(ask_and_leave(worker))
        assert cluster.thread.run(ask("tiny")).endswith(b"[DONE]\n\n")
        with pytest.raises(ModelNotFoundError):
            cluster.thread.run(ask("nobodys"))
        assert [counted(cluster, url, status) for status in (200, 404, 499, 503)] == [1, 1, 1, 0]
    cluster.wait_for_models(url)
