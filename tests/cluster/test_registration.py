"""Laws of a worker's record queue; the connection itself is tested with real processes in test_control_plane.py."""

from __future__ import annotations

import asyncio

from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection


def connection(port: int = 1, **limits: float) -> ControlConnection:
    models = (ModelEntry(name="m", max_context=8, created=1),)
    return ControlConnection(
        controller_address=f"http://localhost:{port}",
        token="t",
        hello=Hello(worker_id="w", address="http://127.0.0.1:1", models=models),
        get_load=Load,
        **limits,
    )


def add(link: ControlConnection, count: int) -> None:
    for _ in range(count):
        link.add_record(
            request_id="r",
            tenant="",
            model="m",
            num_prompt_tokens=1,
            num_cached_tokens=0,
            num_generated_tokens=1,
            reason="stop",
        )


def numbers(link: ControlConnection) -> list[int]:
    return [record.number for record in link._records]


def test_full_queue_drops_the_oldest_and_keeps_the_numbers():
    """A controller that stays away costs records, not memory, and never a number twice."""
    link = connection(max_records=3)
    add(link, 5)
    assert numbers(link) == [3, 4, 5]


def test_acknowledged_records_leave_the_queue():
    """Up to and including the number; what came later stays."""
    link = connection(max_records=10)
    add(link, 4)
    link._acknowledge(3)
    assert numbers(link) == [4]
    link._acknowledge(2)
    assert numbers(link) == [4]
    assert not link._settled.is_set()
    link._acknowledge(4)
    assert link._settled.is_set()


def test_controller_that_says_nothing_is_tried_again():
    """It takes the connection and answers not even the handshake: a worker that waited for ever would be lost to the
    cluster, and nobody would be told."""

    async def law() -> None:
        arrived: asyncio.Queue[None] = asyncio.Queue()

        async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            arrived.put_nowait(None)
            await reader.read()  # until the worker closes it
            writer.close()

        server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
        link = connection(server.sockets[0].getsockname()[1], welcome_limit_s=0.1)
        async with asyncio.timeout(60), link.keep_open():
            await arrived.get()
            await arrived.get()
        server.close()

    asyncio.run(law())
