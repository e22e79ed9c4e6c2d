"""Laws of the choice of a worker."""

from __future__ import annotations

import pytest

from fastchat.cluster.contract import Load, ModelEntry, TableSnapshot, WorkerEntry
from fastchat.cluster.dispatch import Dispatcher, served_models
from fastchat.errors import InvalidRequestError, ModelNotFoundError, UnavailableError


def worker(
    worker_id: str, *, model: str = "m", queued: int = 0, state: str = "ready", capabilities=None
) -> WorkerEntry:
    entry = ModelEntry(name=model, max_context=8, created=1)
    if capabilities is not None:
        entry = entry.model_copy(update={"capabilities": capabilities})
    return WorkerEntry(
        worker_id=worker_id,
        address="http://127.0.0.1:1",
        models=(entry,),
        load=Load(num_queued_tokens=queued),
        state=state,
    )


def table(*workers: WorkerEntry) -> TableSnapshot:
    return TableSnapshot(epoch="e", version=1, workers=workers)


def test_fewest_outstanding_tokens_win():
    """A worker's own report decides where nothing of ours is in flight."""
    snapshot = table(worker("a", queued=10), worker("b", queued=3), worker("c", queued=4))
    assert Dispatcher().choose(snapshot, "m").worker_id == "b"


def test_a_replica_with_the_model_in_memory_is_preferred():
    """Then one that is loading it; between equals the tokens decide, and a sleeping one serves where it is alone."""

    def replica(worker_id: str, state: str, *, queued: int = 0) -> WorkerEntry:
        entry = worker(worker_id)
        return entry.model_copy(update={"load": Load(num_queued_tokens=queued, states={"m": state})})

    asleep, loading = replica("asleep", "asleep"), replica("loading", "loading")
    awake, idle = replica("awake", "awake", queued=1000), replica("idle", "awake")
    order = [asleep, replica("leaving", "leaving", queued=1), loading, awake, idle]
    for last, best in enumerate(order):
        expected = best.worker_id if best.worker_id != "leaving" else "asleep"
        assert Dispatcher().choose(table(*order[: last + 1]), "m").worker_id == expected
    assert Dispatcher().choose(table(asleep, worker("silent", queued=9)), "m").worker_id == "silent"


def test_requests_of_ours_count_until_the_worker_reports_them():
    """A request sent since the last report counts; once the report changes, the report has it."""
    dispatcher = Dispatcher()
    before = table(worker("a"), worker("b", queued=5))
    with dispatcher.assign(before, "m", num_tokens=100) as chosen:
        assert chosen.worker_id == "a"
        assert dispatcher.choose(before, "m").worker_id == "b"
        after = table(worker("a", queued=2), worker("b", queued=5))
        assert dispatcher.choose(after, "m").worker_id == "a"
    assert dispatcher.num_in_flight == 0
    assert dispatcher.choose(before, "m").worker_id == "a"


def test_equal_workers_take_turns():
    """Idle replicas share short requests evenly."""
    dispatcher = Dispatcher()
    snapshot = table(worker("a"), worker("b"), worker("c"))
    chosen = []
    for _ in range(6):
        with dispatcher.assign(snapshot, "m") as entry:
            chosen.append(entry.worker_id)
    assert chosen == ["a", "b", "c", "a", "b", "c"]


def test_parallel_requests_spread():
    """Nine requests at once over three equal workers are three for each."""
    dispatcher = Dispatcher()
    snapshot = table(worker("a"), worker("b"), worker("c"))
    assignments = [dispatcher.assign(snapshot, "m", num_tokens=50) for _ in range(9)]
    chosen = sorted(assignment.__enter__().worker_id for assignment in assignments)
    assert chosen == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    for assignment in assignments:
        assignment.__exit__(None, None, None)
    assert dispatcher.num_in_flight == 0


@pytest.mark.parametrize("state", ["hung", "draining"])
def test_hung_and_draining_workers_get_nothing_new(state):
    """However idle they look."""
    snapshot = table(worker("a", state=state), worker("b", queued=1000))
    assert Dispatcher().choose(snapshot, "m").worker_id == "b"
    with pytest.raises(UnavailableError):
        Dispatcher().choose(table(worker("a", state=state)), "m")


def test_tried_workers_are_not_tried_again():
    """A worker that failed this request is passed over; when all have, the client is told to try later."""
    snapshot = table(worker("a"), worker("b", queued=9))
    assert Dispatcher().choose(snapshot, "m", tried={"a"}).worker_id == "b"
    with pytest.raises(UnavailableError, match="reached"):
        Dispatcher().choose(snapshot, "m", tried={"a", "b"})


def test_unknown_model_names_those_served():
    """The error says which models there are, each once, those of hung workers too."""
    snapshot = table(worker("a", model="x"), worker("b", model="x"), worker("c", model="y", state="hung"))
    assert served_models(snapshot) == ["x", "y"]
    with pytest.raises(ModelNotFoundError) as caught:
        Dispatcher().choose(snapshot, "m")
    assert caught.value.served == ("x", "y")


def test_model_without_the_capability_is_the_clients_error():
    """Embeddings of a model that has none are refused by name."""
    snapshot = table(worker("a", capabilities=("chat",)))
    assert Dispatcher().choose(snapshot, "m", capability="chat").worker_id == "a"
    with pytest.raises(InvalidRequestError, match="embeddings"):
        Dispatcher().choose(snapshot, "m", capability="embeddings")
