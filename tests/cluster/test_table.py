"""Laws of the worker table, with a clock that the test moves."""

from __future__ import annotations

import pytest

from fastchat.cluster.contract import Hello, Load, ModelEntry
from fastchat.cluster.table import HEART_BEAT_EXPIRATION_S, WorkerTable
from fastchat.errors import PermissionDeniedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def hello(worker_id: str = "w1", model: str = "m") -> Hello:
    entry = ModelEntry(name=model, max_context=8, created=1)
    return Hello(worker_id=worker_id, address=f"http://127.0.0.1:1/{worker_id}", models=(entry,))


def states(table: WorkerTable) -> dict[str, str]:
    return {worker.worker_id: worker.state for worker in table.snapshot().workers}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> WorkerTable:
    return WorkerTable(clock, hang_after_s=30, silent_after_s=5)


def report_for(table: WorkerTable, clock: Clock, registration, seconds: int, load: Load) -> None:
    for _ in range(seconds):
        clock.now += 1
        table.report(registration, load)


def test_closed_connection_means_gone_at_once(table):
    """Removing a registration leaves no entry."""
    registration = table.register(hello())
    table.remove(registration)
    assert states(table) == {}
    assert not table.holds(registration)


def test_silent_worker_is_hung_until_it_speaks(table, clock):
    """No message for more than 5 s is hung; the next message mends it."""
    registration = table.register(hello())
    clock.now += 5
    assert states(table) == {"w1": "ready"}
    clock.now += 0.1
    assert states(table) == {"w1": "hung"}
    table.report(registration, Load(progress=1))
    assert states(table) == {"w1": "ready"}


def test_work_without_progress_is_hung_until_progress_moves(table, clock):
    """Reports alone do not help: the same progress for 30 s with work pending is hung, and only progress ends it."""
    registration = table.register(hello())
    stuck = Load(progress=7, num_running=1)
    report_for(table, clock, registration, 31, stuck)
    assert states(table) == {"w1": "ready"}
    report_for(table, clock, registration, 1, stuck)
    assert states(table) == {"w1": "hung"}
    report_for(table, clock, registration, 3, Load(progress=7))
    assert states(table) == {"w1": "hung"}
    report_for(table, clock, registration, 1, Load(progress=8))
    assert states(table) == {"w1": "ready"}


def test_idle_worker_is_never_hung(table, clock):
    """Half an hour without work and without progress is idleness, also right after work."""
    registration = table.register(hello())
    report_for(table, clock, registration, 20, Load(progress=7, num_running=1))
    report_for(table, clock, registration, 1800, Load(progress=7))
    assert states(table) == {"w1": "ready"}
    report_for(table, clock, registration, 29, Load(progress=7, num_running=1))
    assert states(table) == {"w1": "ready"}


def test_waiting_requests_without_progress_are_pending_work(table, clock):
    """A scheduler that starts nothing hangs too."""
    registration = table.register(hello())
    report_for(table, clock, registration, 32, Load(num_waiting=3))
    assert states(table) == {"w1": "hung"}


def test_draining_worker_stays_until_its_connection_closes(table, clock):
    """Goodbye is a state, not an end; a draining worker that falls silent is hung."""
    registration = table.register(hello())
    table.drain(registration)
    assert states(table) == {"w1": "draining"}
    table.report(registration, Load(progress=1, num_running=1))
    assert states(table) == {"w1": "draining"}
    clock.now += 6
    assert states(table) == {"w1": "hung"}
    table.remove(registration)
    assert states(table) == {}


def test_second_connection_with_a_living_workers_id_is_refused(table):
    """A worker id belongs to its connection as long as that is alive."""
    table.register(hello())
    with pytest.raises(PermissionDeniedError, match="w1"):
        table.register(hello())


def test_second_connection_replaces_a_hung_one_and_survives_its_end(table, clock):
    """After a take-over the old connection can neither report for, nor remove, the new one."""
    old = table.register(hello())
    clock.now += 6
    new = table.register(hello())
    table.report(old, Load(progress=99))
    table.remove(old)
    table.drain(old)
    assert states(table) == {"w1": "ready"}
    assert table.snapshot().workers[0].load == Load()
    assert table.holds(new)
    assert not table.holds(old)


def test_several_workers_serve_the_same_model(table):
    """Replicas are two entries."""
    table.register(hello("w1", "m"))
    table.register(hello("w2", "m"))
    assert [worker.models[0].name for worker in table.snapshot().workers] == ["m", "m"]


def test_new_worker_of_an_address_ends_the_earlier_one(table):
    """The address was asked and answered as the new worker: the other cannot be there any more."""
    old = table.register(hello("w1"))
    table.register(hello("w2").model_copy(update={"address": old.address}))
    assert states(table) == {"w2": "ready"}


def test_version_grows_with_every_change_and_only_then(table, clock):
    """The same object comes back until something changes; a report of the same load is no change."""
    registration = table.register(hello())
    first = table.snapshot()
    clock.now += 1
    table.report(registration, Load())
    assert table.snapshot() is first
    table.report(registration, Load(progress=1))
    assert table.snapshot().version > first.version


def test_listener_learns_whether_more_than_load_changed(table, clock):
    """Loads are not urgent; arrivals, states and departures are."""
    heard: list[bool] = []
    table.add_listener(heard.append)
    registration = table.register(hello())
    table.report(registration, Load(progress=1))
    clock.now += 6
    table.sweep()
    table.remove(registration)
    assert heard == [True, False, True, True]
    table.remove_listener(heard.append)


def test_external_server_without_heart_beat_stays(table, clock):
    """check_heart_beat false: no message is ever expected."""
    table.register_external("http://h:1", ("m",), created=1, queue_length=0, expects_heart_beats=False)
    clock.now += 1_000_000
    (worker,) = table.snapshot().workers
    assert (worker.is_external, worker.state) == (True, "ready")


def test_external_server_with_heart_beat_expires(table, clock):
    """check_heart_beat true: 90 s after the last beat it is gone, and told so."""
    table.register_external("http://h:1", ("m",), created=1, queue_length=0, expects_heart_beats=True)
    clock.now += HEART_BEAT_EXPIRATION_S - 1
    assert table.heart_beat("http://h:1", 4)
    assert table.snapshot().workers[0].load.num_waiting == 4
    clock.now += HEART_BEAT_EXPIRATION_S + 1
    assert not table.heart_beat("http://h:1", 0)
    assert states(table) == {}


def test_external_server_registered_again_is_replaced(table):
    """One URL is one entry."""
    for name in ("a", "b"):
        table.register_external("http://h:1", (name,), created=1, queue_length=0, expects_heart_beats=False)
    (worker,) = table.snapshot().workers
    assert worker.models[0].name == "b"
