"""Which models are not in memory, as the page learns it."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
from aiohttp import web

from fastchat.web.api_client import ApiClient
from fastchat.web.model_states import Absence, ModelStates, absences


def row(name, state, **facts):
    return {"id": name, "aliases": [], "worker": "w", "state": state, **facts}


def test_the_nearest_replica_counts_for_all_names():
    """Awake anywhere is awake; of those that load, the one that has read most."""
    rows = [
        row("a", "asleep", aliases=["also-a"]),
        row("b", "loading", progress=0.25),
        row("b", "loading", progress=0.507),
        row("b", "asleep"),
        row("c", "asleep"),
        row("c", "awake"),
        row("d", "leaving"),
        row("e", "external"),
        row("f", "unreachable"),
    ]
    asleep = Absence("asleep", 0)
    assert absences({"data": rows}) == {"a": asleep, "also-a": asleep, "b": Absence("loading", 50), "d": asleep}


def test_an_adapter_sleeps_with_its_base():
    """It is asked for by its own name, and no row is its own."""
    document = {"data": [row("base", "asleep") | {"adapters": ["style"]}]}
    assert absences(document) == dict.fromkeys(("base", "style"), Absence("asleep", 0))


@pytest.mark.parametrize(
    "document",
    [None, [], {}, {"data": None}, {"data": [1, {}, {"id": 5, "state": "asleep"}, {"id": "a", "state": []}]}],
)
def test_other_documents_say_nothing(document):
    """Another server's, for example."""
    assert absences(document) == {}


@pytest.mark.parametrize("progress", [None, "0.5", -1, 2, float("nan"), True])
def test_a_model_that_loads_has_read_a_share(progress):
    """Between nothing and all."""
    found = absences({"data": [row("a", "loading", progress=progress)]})
    assert found["a"].percent in (0, 100)


def test_a_refusal_is_believed_for_a_while():
    """A key that may not know is not tried again with every look at the list."""
    asked = []

    async def refuse(request):
        asked.append(request.path)
        return web.json_response({"error": {"message": "This key is no operator's.", "type": "x"}}, status=403)

    async def look_twice():
        app = web.Application()
        app.router.add_get("/api/v1/models", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        client = ApiClient(f"http://127.0.0.1:{runner.addresses[0][1]}")
        async with client.keep_open():
            states = ModelStates(client, limit_s=60.0)
            await states.refresh()
            await states.refresh()
        await runner.cleanup()
        return states.absences

    with ThreadPoolExecutor(1) as pool:  # the browser's own loop runs in this thread
        assert pool.submit(asyncio.run, look_twice()).result() == {}
    assert asked == ["/api/v1/models"]
