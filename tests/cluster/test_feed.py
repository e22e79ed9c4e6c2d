"""Laws of the stream of snapshots. Time is the loop's; the limits are wide enough for a busy machine."""

from __future__ import annotations

import asyncio
import time

from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.feed import HEARTBEAT_S, MIN_LOAD_INTERVAL_S, TableFeed
from fastchat.cluster.table import WorkerTable


def hello(worker_id: str) -> Hello:
    entry = ModelEntry(name="m", max_context=8, created=1)
    return Hello(worker_id=worker_id, address="http://127.0.0.1:1", models=(entry,))


def test_first_snapshot_comes_at_once_and_arrivals_too():
    """Who comes and goes is told without delay."""

    async def law() -> None:
        table = WorkerTable(time.monotonic)
        with TableFeed(table) as feed:
            assert (await feed.next_snapshot()).workers == ()
            registration = table.register(hello("w1"))
            async with asyncio.timeout(MIN_LOAD_INTERVAL_S / 2):
                assert len((await feed.next_snapshot()).workers) == 1
            waiting = asyncio.create_task(feed.next_snapshot())
            await asyncio.sleep(0)
            table.remove(registration)
            async with asyncio.timeout(MIN_LOAD_INTERVAL_S / 2):
                assert (await waiting).workers == ()

    asyncio.run(law())


def test_load_changes_are_gathered_and_none_is_lost():
    """Many loads make few snapshots, at most four in a second, and the last one has the last load."""

    async def law() -> None:
        table = WorkerTable(time.monotonic)
        registration = table.register(hello("w1"))
        with TableFeed(table) as feed:
            await feed.next_snapshot()
            began = time.monotonic()
            progress = [0]

            async def report() -> None:
                while progress[0] < 40:
                    progress[0] += 1
                    table.report(registration, Load(progress=progress[0]))
                    await asyncio.sleep(0.01)

            task = asyncio.create_task(report())
            count = 0
            while (await feed.next_snapshot()).workers[0].load.progress < 40:
                count += 1
            await task
            assert count <= (time.monotonic() - began) / MIN_LOAD_INTERVAL_S

    asyncio.run(law())


def test_quiet_table_is_repeated_as_heartbeat():
    """Nothing new is said too, so that silence means a dead connection."""

    async def law() -> None:
        table = WorkerTable(time.monotonic)
        with TableFeed(table) as feed:
            first = await feed.next_snapshot()
            async with asyncio.timeout(20 * HEARTBEAT_S):
                assert await feed.next_snapshot() is first

    asyncio.run(law())


def test_closed_feed_ends_whoever_waits():
    """A controller that stops does not wait for its watchers; the table forgets the feed."""

    async def law() -> None:
        table = WorkerTable(time.monotonic)
        with TableFeed(table) as feed:
            await feed.next_snapshot()
            waiting = asyncio.create_task(feed.next_snapshot())
            await asyncio.sleep(0)
            feed.close()
            assert await waiting is None
        assert table._listeners == []

    asyncio.run(law())
