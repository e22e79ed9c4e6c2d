"""Who serves what: the controller's table. A plain class without I/O or clock; owned by one event loop.

States of a worker, judged anew whenever the table is looked at:

    ready      it reports, and its progress moves or nothing is pending
    draining   it said goodbye: running requests go on, new ones go elsewhere
    hung       no message for `silent_after_s`, or work pending for `hang_after_s` without progress
    (gone)     its connection closed, or its last heart-beat is too old
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from fastchat.cluster.contract import Hello, Load, ModelEntry, TableSnapshot, WorkerEntry
from fastchat.errors import PermissionDeniedError

HEART_BEAT_EXPIRATION_S = 90.0
"""FastChat's: how long a registered server that promised heart-beats stays without one."""

State = Literal["ready", "draining", "hung"]
Listener = Callable[[bool], None]
"""Called after a change; True when more than loads changed: who is there, what they serve, a state."""


@dataclass(slots=True, eq=False)
class Registration:
    """One worker's place in the table. Made by the table, handed back to it by who registered."""

    worker_id: str
    address: str
    models: tuple[ModelEntry, ...]
    registered_at: float
    is_external: bool = False
    expects_heart_beats: bool = False
    load: Load = field(default_factory=Load)
    heard_at: float = 0.0
    pending_since: float | None = None  # when the present progress was first seen with work pending
    is_draining: bool = False
    state: State = "ready"


class WorkerTable:
    """All workers of a cluster. `clock` is monotonic and counts seconds."""

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        hang_after_s: float = 30.0,
        silent_after_s: float = 5.0,
        epoch: str | None = None,
    ) -> None:
        self._clock = clock
        self._hang_after_s = hang_after_s
        self._silent_after_s = silent_after_s
        self._epoch = secrets.token_hex(8) if epoch is None else epoch
        self._version = 0
        self._registrations: dict[str, Registration] = {}
        self._listeners: list[Listener] = []
        self._snapshot: TableSnapshot | None = None

    def __repr__(self) -> str:
        states = ", ".join(f"{worker_id}={entry.state}" for worker_id, entry in self._registrations.items())
        return f"<WorkerTable version={self._version} {states}>"

    def snapshot(self) -> TableSnapshot:
        """The table now; the same object until something changes."""
        self.sweep()
        if self._snapshot is None:
            self._snapshot = TableSnapshot(
                epoch=self._epoch,
                version=self._version,
                workers=tuple(_entry(registration) for registration in self._registrations.values()),
            )
        return self._snapshot

    def register(self, hello: Hello) -> Registration:
        """A worker whose connection is open and whose address was verified.

        The same worker id may come again only when its earlier connection has closed or hangs; otherwise
        `PermissionDeniedError`: two processes that claim to be one worker. An earlier worker of the same address is
        gone, since the address now answers as this one.
        """
        self.check_free(hello.worker_id)
        for earlier in [entry for entry in self._registrations.values() if entry.address == hello.address]:
            self.remove(earlier)
        now = self._clock()
        registration = Registration(hello.worker_id, hello.address, hello.models, registered_at=now, heard_at=now)
        self._put(registration)
        return registration

    def check_free(self, worker_id: str) -> None:
        """Raise `PermissionDeniedError` where `worker_id` is held by a worker that is alive."""
        self.sweep()
        holder = self._registrations.get(worker_id)
        if holder is not None and holder.state != "hung":
            raise PermissionDeniedError(
                f"a worker with the id {worker_id} is connected from {holder.address}; each worker needs its own id.",
                code="worker_id_taken",
            )

    def register_external(
        self, address: str, model_names: tuple[str, ...], *, created: int, queue_length: int, expects_heart_beats: bool
    ) -> Registration:
        """An OpenAI-compatible server that an operator names by URL; registering it again replaces it."""
        now = self._clock()
        registration = Registration(
            external_worker_id(address),
            address,
            tuple(ModelEntry(name=name, max_context=0, created=created) for name in model_names),
            registered_at=now,
            is_external=True,
            expects_heart_beats=expects_heart_beats,
            load=Load(num_waiting=queue_length),
            heard_at=now,
        )
        self._put(registration)
        return registration

    def heart_beat(self, address: str, queue_length: int) -> bool:
        """Renew an external server; False where it is not in the table and should register again."""
        self.sweep()
        registration = self._registrations.get(external_worker_id(address))
        if registration is None:
            return False
        self.report(registration, Load(num_waiting=queue_length))
        return True

    def report(self, registration: Registration, load: Load) -> None:
        """What a worker said of itself. Ignored after another connection has taken its place."""
        if not self.holds(registration):
            return
        now = self._clock()
        registration.pending_since = self._pending_since(registration, load, now)
        registration.heard_at = now
        if load != registration.load:
            registration.load = load
            self._changed(is_urgent=False)
        self.sweep()

    def change_models(self, registration: Registration, models: tuple[ModelEntry, ...]) -> None:
        """What a worker serves from now on. Ignored after another connection has taken its place."""
        if self.holds(registration):
            registration.models = models
            registration.heard_at = self._clock()
            self._changed(is_urgent=True)

    def hear(self, registration: Registration) -> None:
        """A message that carries no load, such as a final record, shows that the worker lives."""
        registration.heard_at = self._clock()
        self.sweep()

    def drain(self, registration: Registration) -> None:
        """The worker takes no new requests."""
        registration.is_draining = True
        self.sweep()

    def remove(self, registration: Registration) -> None:
        """The worker's connection is closed: it is gone. Ignored after another connection has taken its place."""
        if self.holds(registration):
            del self._registrations[registration.worker_id]
            self._changed(is_urgent=True)

    def holds(self, registration: Registration) -> bool:
        """Whether the registration still has its place: no other connection took it, and it was not removed."""
        return self._registrations.get(registration.worker_id) is registration

    def find_external(self, address: str) -> Registration | None:
        """The external server registered under `address`."""
        return self._registrations.get(external_worker_id(address))

    def sweep(self) -> None:
        """Judge every state by the clock. Called by all reading methods, and now and then by the table's owner."""
        now = self._clock()
        for registration in list(self._registrations.values()):
            if registration.expects_heart_beats and now - registration.heard_at > HEART_BEAT_EXPIRATION_S:
                self.remove(registration)
                continue
            state = self._judge(registration, now)
            if state != registration.state:
                registration.state = state
                self._changed(is_urgent=True)

    def add_listener(self, listener: Listener) -> None:
        """Call `listener` after every change, until it is removed."""
        self._listeners.append(listener)

    def remove_listener(self, listener: Listener) -> None:
        """Stop calling `listener`."""
        self._listeners.remove(listener)

    def _put(self, registration: Registration) -> None:
        self._registrations.pop(registration.worker_id, None)
        self._registrations[registration.worker_id] = registration
        self._changed(is_urgent=True)

    def _pending_since(self, registration: Registration, load: Load, now: float) -> float | None:
        has_moved = load.progress != registration.load.progress
        is_busy = load.num_running > 0 or load.num_waiting > 0
        if has_moved or registration.pending_since is None:
            return now if is_busy else None
        if not is_busy and now - registration.pending_since <= self._hang_after_s:
            return None
        return registration.pending_since  # busy still; or judged hung, which only progress mends

    def _judge(self, registration: Registration, now: float) -> State:
        if not registration.is_external:
            is_silent = now - registration.heard_at > self._silent_after_s
            since = registration.pending_since
            if is_silent or (since is not None and now - since > self._hang_after_s):
                return "hung"
        return "draining" if registration.is_draining else "ready"

    def _changed(self, *, is_urgent: bool) -> None:
        self._version += 1
        self._snapshot = None
        for listener in list(self._listeners):
            listener(is_urgent)


def external_worker_id(address: str) -> str:
    """The worker id of a server registered by URL."""
    return f"external:{address}"


def _entry(registration: Registration) -> WorkerEntry:
    return WorkerEntry(
        worker_id=registration.worker_id,
        address=registration.address,
        models=registration.models,
        load=registration.load,
        state=registration.state,
        is_external=registration.is_external,
    )
