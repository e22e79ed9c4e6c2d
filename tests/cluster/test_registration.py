"""Laws of a worker's record queue; the connection itself is tested with real processes in test_control_plane.py."""

from __future__ import annotations

from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.registration import ControlConnection


def connection(max_records: int) -> ControlConnection:
    models = (ModelEntry(name="m", max_context=8, created=1),)
    return ControlConnection(
        controller_address="http://localhost:1",
        token="t",
        hello=Hello(worker_id="w", address="http://127.0.0.1:1", models=models),
        get_load=Load,
        max_records=max_records,
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
