"""One request on its way to one worker: the HTTP call, and the end of the wait when the worker is lost.

There is no timeout on an answer, since a long one is normal. What ends a wait is the table: while a worker is missing
from it or hung there, an exchange must deliver a byte within `DOUBT_S`, or it ends. A worker that only lost its
controller goes on undisturbed, because its bytes keep coming or it is back before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal, TypeVar

from fastchat.cluster.contract import TableSnapshot, WorkerEntry
from fastchat.errors import UnavailableError
from fastchat.gateway.worker_connection import Answer
from fastchat.gateway.worker_http import ConnectError, WorkerHttp

T = TypeVar("T")

DOUBT_S = 5.0
UNREACHABLE = "worker_unreachable"
"""The code of a failure before the worker had the request."""
LOST = "worker_lost"
"""The code of a failure after it may have begun."""


class Exchange:
    """A call to `worker`. Owned by one relayed request; `close` ends it at once, by whatever way it is left."""

    def __init__(self, worker: WorkerEntry, doubt_s: float = DOUBT_S) -> None:
        self.worker = worker
        self._doubt_s = doubt_s
        self._answer: Answer | None = None
        self._is_doubted = False
        self._is_given_up = False
        self._waiter: asyncio.Task[object] | None = None  # who waits for the worker now
        self._patience: asyncio.TimerHandle | None = None  # of that wait, while the worker is doubted

    def __repr__(self) -> str:
        doubted = " doubted" if self._is_doubted else ""
        return f"<Exchange worker={self.worker.worker_id}{doubted}>"

    async def start(
        self,
        http: WorkerHttp,
        path: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        method: Literal["POST", "DELETE"] = "POST",
    ) -> Answer:
        """Send the request and wait for the answer's head. Raises `UnavailableError`."""
        with _lost_worker_translated():
            self._answer = await self._while_worker_lives(
                http.ask(self.worker.address, path, headers, body, method=method)
            )
        return self._answer

    async def read(self) -> bytes:
        """The next bytes of the answer, all that have arrived; b"" at its proper end. Raises `UnavailableError`."""
        assert self._answer is not None
        with _lost_worker_translated():
            return await self._while_worker_lives(self._answer.read())

    def doubt(self) -> None:
        """The table says that the worker is gone or hung: the next byte must come soon."""
        if not self._is_doubted:
            self._is_doubted = True
            if self._waiter is not None:
                self._lose_patience_later(self._waiter)

    def trust(self) -> None:
        """The worker is well (again)."""
        if self._is_doubted:
            self._is_doubted = False
            self._be_patient()

    def close(self) -> None:
        """Close the connection unless the answer was read to its end; the worker then aborts."""
        if self._answer is not None:
            self._answer.close()

    async def _while_worker_lives(self, step: Awaitable[T]) -> T:
        """What `asyncio.timeout` does, at no cost for each step while nobody doubts the worker."""
        self._waiter = waiter = asyncio.current_task()
        assert waiter is not None
        num_cancelled = waiter.cancelling()
        if self._is_doubted:
            self._lose_patience_later(waiter)
        try:
            return await step
        except asyncio.CancelledError:
            if self._is_given_up and waiter.uncancel() <= num_cancelled:
                raise TimeoutError from None
            raise
        finally:
            self._waiter = None
            if self._patience is not None:
                self._be_patient()

    def _lose_patience_later(self, waiter: asyncio.Task[object]) -> None:
        self._patience = asyncio.get_running_loop().call_later(self._doubt_s, self._give_up, waiter)

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self, waiter: asyncio.Task[object]) -> None:
        self._is_given_up = True
        waiter.cancel()


class Exchanges:
    """All exchanges under way, told about every change of the table."""

    def __init__(self, doubt_s: float = DOUBT_S) -> None:
        self._doubt_s = doubt_s
        self._by_worker: dict[str, set[Exchange]] = {}

    def __repr__(self) -> str:
        return f"<Exchanges {sum(len(each) for each in self._by_worker.values())} under way>"

    @contextmanager
    def open(self, worker: WorkerEntry) -> Iterator[Exchange]:
        """A new exchange, closed at the end of the block."""
        exchange = Exchange(worker, self._doubt_s)
        self._by_worker.setdefault(worker.worker_id, set()).add(exchange)
        try:
            yield exchange
        finally:
            exchange.close()
            remaining = self._by_worker[worker.worker_id]
            remaining.discard(exchange)
            if not remaining:
                del self._by_worker[worker.worker_id]

    def heed(self, snapshot: TableSnapshot) -> None:
        """Doubt the exchanges of workers that are missing or hung, trust the others."""
        well = {worker.worker_id for worker in snapshot.workers if worker.state != "hung"}
        for worker_id, exchanges in self._by_worker.items():
            for exchange in exchanges:
                if worker_id in well:
                    exchange.trust()
                else:
                    exchange.doubt()


@contextmanager
def _lost_worker_translated() -> Iterator[None]:
    """Every way in which a connection fails, as one error; which one it was is the error's cause."""
    try:
        yield
    except ConnectError as error:
        raise UnavailableError("The worker could not be reached; try again.", code=UNREACHABLE) from error
    except OSError as error:  # a TimeoutError is one
        raise UnavailableError("The worker was lost before its answer was complete; try again.", code=LOST) from error
