"""Which worker a request goes to: one that has the model in memory, and of those the one with the fewest outstanding
tokens. Policy only; it sends nothing.

A worker's outstanding tokens are what it last reported and what this process has sent it since: a request of ours
counts until the worker's report changes, because the report then includes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from fastchat.cluster.contract import Load, ModelState, TableSnapshot, WorkerEntry
from fastchat.errors import InvalidRequestError, ModelNotFoundError, UnavailableError

_DISTANCES: dict[ModelState, int] = {"awake": 0, "loading": 1, "leaving": 2, "asleep": 2}

Capability = Literal["chat", "completions", "embeddings"]


@dataclass(frozen=True, slots=True, eq=False)
class _Assignment:
    """One request in flight: its size, and the worker's report when it was sent."""

    worker_id: str
    num_tokens: int
    load: Load


class Dispatcher:
    """Chooses workers and remembers what it has given them. Owned by one event loop."""

    def __init__(self) -> None:
        self._in_flight: dict[str, set[_Assignment]] = {}
        self._num_chosen = 0
        self._chosen_last: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Dispatcher num_in_flight={self.num_in_flight}>"

    @property
    def num_in_flight(self) -> int:
        """Requests assigned and not ended."""
        return sum(len(assignments) for assignments in self._in_flight.values())

    @contextmanager
    def assign(
        self,
        snapshot: TableSnapshot,
        model: str,
        *,
        num_tokens: int = 1,
        capability: Capability | None = None,
        tried: Collection[str] = (),
    ) -> Iterator[WorkerEntry]:
        """`choose`, and count a request of about `num_tokens` against that worker until the block is left."""
        worker = self.choose(snapshot, model, capability=capability, tried=tried)
        assignment = _Assignment(worker.worker_id, num_tokens, worker.load)
        self._in_flight.setdefault(worker.worker_id, set()).add(assignment)
        self._num_chosen += 1
        self._chosen_last[worker.worker_id] = self._num_chosen
        try:
            yield worker
        finally:
            self._release(assignment, snapshot)

    def choose(
        self,
        snapshot: TableSnapshot,
        model: str,
        *,
        capability: Capability | None = None,
        tried: Collection[str] = (),
    ) -> WorkerEntry:
        """The worker for one request to `model`; `tried` are worker ids that have failed it already.

        Raises `ModelNotFoundError` where nobody serves the model, `InvalidRequestError` where it lacks `capability`,
        and `UnavailableError` where all who serve it are hung, draining or tried.
        """
        serving = [worker for worker in snapshot.workers if _serves(worker, model, None)]
        if not serving:
            raise ModelNotFoundError(model, served_models(snapshot))
        capable = [worker for worker in serving if _serves(worker, model, capability)]
        if not capable:
            raise InvalidRequestError(f"The model `{model}` does not serve {capability}.", param="model")
        ready = [worker for worker in capable if worker.state == "ready" and worker.worker_id not in tried]
        if not ready:
            raise UnavailableError(_why_not(model, capable, tried), code="no_worker")
        return min(ready, key=lambda worker: (_distance(worker, model), self._rank(worker)))

    def _rank(self, worker: WorkerEntry) -> tuple[int, int, int]:
        """Fewest outstanding tokens first, then fewest requests of ours, then the one chosen longest ago."""
        assignments = self._in_flight.get(worker.worker_id, ())
        num_unreported = sum(
            assignment.num_tokens
            for assignment in assignments
            if assignment.load is worker.load or assignment.load == worker.load
        )
        return (
            worker.load.num_queued_tokens + num_unreported,
            len(assignments) + worker.load.num_waiting,
            self._chosen_last.get(worker.worker_id, 0),
        )

    def _release(self, assignment: _Assignment, snapshot: TableSnapshot) -> None:
        assignments = self._in_flight[assignment.worker_id]
        assignments.remove(assignment)
        if not assignments:
            del self._in_flight[assignment.worker_id]
        if len(self._chosen_last) > 2 * len(snapshot.workers) + 16:  # forget workers that are long gone
            known = {worker.worker_id for worker in snapshot.workers}
            self._chosen_last = {key: value for key, value in self._chosen_last.items() if key in known}


def served_models(snapshot: TableSnapshot) -> list[str]:
    """The names of all models in the table, sorted, each once."""
    return sorted({model.name for worker in snapshot.workers for model in worker.models})


def _serves(worker: WorkerEntry, model: str, capability: Capability | None) -> bool:
    return any(
        entry.name == model and (capability is None or capability in entry.capabilities) for entry in worker.models
    )


def _distance(worker: WorkerEntry, model: str) -> int:
    """How far a worker is from answering: 0 with the model in memory, 1 while it loads, 2 where it must be loaded."""
    return _DISTANCES[worker.load.states.get(model, "awake")]


def _why_not(model: str, capable: list[WorkerEntry], tried: Collection[str]) -> str:
    num_tried = sum(worker.worker_id in tried for worker in capable)
    if num_tried == len(capable):
        return f"No worker of the model `{model}` could be reached; try again in a moment."
    return f"The model `{model}` is served, but no worker of it takes requests now; try again in a moment."
