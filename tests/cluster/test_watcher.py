"""Laws of the last table known, with a clock that the test moves and lines as the controller writes them."""

from __future__ import annotations

import asyncio

import pytest

from fastchat.cluster.contract import Load, ModelEntry, TableSnapshot, WorkerEntry
from fastchat.cluster.watcher import CARRY_OVER_S, TableWatcher


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def line(epoch: str, version: int, *worker_ids: str) -> bytes:
    workers = tuple(
        WorkerEntry(
            worker_id=worker_id,
            address="http://127.0.0.1:1",
            models=(ModelEntry(name="m", max_context=8, created=1),),
            load=Load(),
            state="ready",
        )
        for worker_id in worker_ids
    )
    return TableSnapshot(epoch=epoch, version=version, workers=workers).model_dump_json().encode() + b"\n"


def ids(watcher: TableWatcher) -> set[str]:
    return {worker.worker_id for worker in watcher.snapshot.workers}


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watcher(clock):
    return TableWatcher(controller_address="http://localhost:1", token="t", clock=clock)


def test_workers_are_kept_while_they_register_with_a_new_controller(watcher, clock):
    """A fresh controller's empty table is no news; after 3 s whoever did not come back is gone."""
    watcher._take(line("a", 5, "w1", "w2"))
    watcher._take(line("b", 0))
    assert ids(watcher) == {"w1", "w2"}
    clock.now += 1
    watcher._take(line("b", 1, "w1"))
    assert ids(watcher) == {"w1", "w2"}
    clock.now += CARRY_OVER_S
    watcher._take(line("b", 1, "w1"))
    assert ids(watcher) == {"w1"}


def test_who_registered_with_a_new_controller_and_left_it_is_gone_at_once(watcher):
    """Nothing of it is kept from the earlier table."""
    watcher._take(line("a", 5, "w1", "w2"))
    watcher._take(line("b", 1, "w1"))
    watcher._take(line("b", 2))
    assert ids(watcher) == {"w2"}


def test_same_controller_is_believed_at_once(watcher):
    """Carrying over is for restarts alone."""
    watcher._take(line("a", 1, "w1", "w2"))
    watcher._take(line("a", 2, "w2"))
    assert ids(watcher) == {"w2"}


def test_repeated_table_is_no_change(watcher):
    """A heartbeat wakes nobody."""
    assert not watcher.has_snapshot
    watcher._take(line("a", 1, "w1"))
    known = watcher.snapshot
    watcher._take(line("a", 1, "w1"))
    assert watcher.snapshot is known
    assert watcher.has_snapshot


def test_every_waiter_gets_the_change(watcher):
    """Several parts of a process may follow the table."""

    async def law() -> None:
        known = watcher.snapshot
        waiters = [asyncio.create_task(watcher.wait_for_change(known)) for _ in range(3)]
        await asyncio.sleep(0)
        watcher._take(line("a", 1, "w1"))
        assert await asyncio.gather(*waiters) == [watcher.snapshot] * 3

    asyncio.run(law())


def test_what_is_no_table_ends_the_connection(watcher):
    """And leaves the last table as it was."""
    watcher._take(line("a", 1, "w1"))
    with pytest.raises(ConnectionResetError):
        watcher._take(b'{"workers": []}\n')
    assert ids(watcher) == {"w1"}
