"""Which workers are of no use, judged by the controller's table and a clock that the test turns."""

from __future__ import annotations

import pytest

from fastchat.cluster.contract import Load, ModelEntry, TableSnapshot, WorkerEntry
from fastchat.supervisor.worker_watch import WorkerWatch

ADDRESS = "http://127.0.0.1:21002"


def table(state, worker_id="w1", address=ADDRESS):
    models = (ModelEntry(name="tiny", max_context=512, created=1),)
    worker = WorkerEntry(worker_id=worker_id, address=address, models=models, load=Load(), state=state)
    return TableSnapshot(epoch="e", version=1, workers=(worker,))


class Rig:
    def __init__(self):
        self.now = 100.0
        self.replaced = []
        self.watch = WorkerWatch({ADDRESS: "worker of tiny"}, self._replace, clock=lambda: self.now, stuck_after_s=15)

    def _replace(self, name, *, reason, is_stuck):
        self.replaced.append((name, reason, is_stuck))


@pytest.fixture
def rig():
    return Rig()


def test_worker_that_drains_unasked_is_asked_to_end_once(rig):
    """It has lost an engine; what its other engines compute is let finish."""
    assert rig.watch.look(table("ready")) is None
    rig.watch.look(table("draining"))
    rig.watch.look(table("draining"))
    assert rig.replaced == [("worker of tiny", "it takes no more requests", False)]
    rig.watch.look(table("ready", "w2"))
    rig.watch.look(table("draining", "w2"))
    assert len(rig.replaced) == 2


def test_hung_worker_is_killed_when_it_has_not_moved_for_long_enough(rig):
    """Once; and a worker that moves again in time is left alone."""
    assert rig.watch.look(table("hung")) == 15
    rig.now += 10
    assert rig.watch.look(table("hung")) == 5
    assert rig.watch.look(table("ready")) is None
    assert rig.watch.look(table("hung")) == 15
    rig.now += 15
    assert rig.watch.look(table("hung")) is None
    assert rig.replaced == [("worker of tiny", "it stands still", True)]
    rig.now += 60
    assert rig.watch.look(table("hung")) is None
    assert len(rig.replaced) == 1


def test_workers_of_others_are_not_touched(rig):
    """Another machine's worker may register too; it has its own keeper."""
    rig.watch.look(table("draining", address="http://10.0.0.7:21002"))
    rig.watch.look(table("hung", address="http://10.0.0.7:21002"))
    rig.now += 100
    assert rig.watch.look(table("hung", address="http://10.0.0.7:21002")) is None
    assert rig.replaced == []
