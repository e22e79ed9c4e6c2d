"""The table as the API server uses it: always the newest, and with a memory for what was just there.

A model whose last worker left is not unknown: it is unavailable. That is what a client must hear while a worker
restarts, since a 404 tells it never to ask again. Nor is a model that is expected, nor anything while no worker at all
is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import NoReturn

from fastchat.cluster.contract import TableSnapshot, WorkerEntry
from fastchat.cluster.dispatch import served_models
from fastchat.cluster.watcher import TableWatcher
from fastchat.errors import FastChatError, ModelNotFoundError, UnavailableError

REMEMBERED_S = 600.0
"""How long a model that has left the table is still known: longer than a large one takes to be loaded again."""
MAX_REMEMBERED = 1000
"""Models; of more the latest are known."""


class LiveTable:
    """The watcher's snapshot, and the models that have left it. `clock` is monotonic."""

    def __init__(
        self,
        watcher: TableWatcher,
        controller_address: str,
        clock: Callable[[], float] = time.monotonic,
        *,
        expected_models: Collection[str] = (),
    ) -> None:
        self._watcher = watcher
        self._controller_address = controller_address
        self._clock = clock
        self._expected_models = expected_models
        self._left_at: dict[str, float] = {}

    def current(self) -> TableSnapshot:
        """The newest snapshot. Raises `UnavailableError` before the first."""
        if not self._watcher.has_snapshot:
            raise UnavailableError(
                f"This API server waits for the controller at {self._controller_address}, "
                "which has not answered yet; start it, or give its URL with --controller-address.",
                retry_after_s=2,
                code="no_controller",
            )
        return self._watcher.snapshot

    def served(self) -> list[str]:
        """The names of all models in the table; none before the first snapshot."""
        return served_models(self._watcher.snapshot)

    def workers(self) -> tuple[WorkerEntry, ...]:
        """All workers of the newest snapshot; none before the first."""
        return self._watcher.snapshot.workers

    def explain(self, error: FastChatError) -> FastChatError:
        """`error`, or where a model is not known that was or may be served, the error that says so."""
        if not isinstance(error, ModelNotFoundError):
            return error
        left_at = self._left_at.get(error.model)
        if left_at is not None and self._clock() - left_at <= REMEMBERED_S:
            why = f"The last worker of the model `{error.model}` is gone"
        elif error.model in self._expected_models:
            why = f"The model `{error.model}` is still being loaded"
        elif not self.workers():
            why = "No worker has registered, so no model is served"
        else:
            return error
        return UnavailableError(f"{why}; try again in a moment.", retry_after_s=2, code="no_worker")

    async def follow(self, on_change: Callable[[TableSnapshot], None]) -> NoReturn:
        """Call `on_change` with every new snapshot, for as long as the process lives."""
        known = self._watcher.snapshot
        while True:
            fresh = await self._watcher.wait_for_change(known)
            self._note_left(served_models(known), served_models(fresh))
            known = fresh
            on_change(fresh)

    def _note_left(self, before: list[str], now_served: list[str]) -> None:
        now = self._clock()
        self._left_at = {name: at for name, at in self._left_at.items() if now - at <= REMEMBERED_S}
        self._left_at.update({name: now for name in before if name not in now_served})
        for name in list(self._left_at)[:-MAX_REMEMBERED]:
            del self._left_at[name]
