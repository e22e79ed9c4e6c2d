"""Which models are in memory: the policy. Knows bytes, requests and time; loads nothing itself. Torch-free.

Each model of a worker is in one of four places:

    ASLEEP ──load──▶ LOADING ──loaded──▶ AWAKE ──unload──▶ LEAVING ──unloaded──▶ ASLEEP
                        └──────────────load_failed──────────────────────────────────▲

A request takes a *ticket* for its model. The ticket is granted while the model is awake, and then the model stays
until the ticket is given back. Otherwise it waits in one line. Whoever is first in that line gets memory next: idle
models leave, the least recently used first. A model that is busy without a pause is closed to newcomers once the first
in line has waited `patience_s`; what runs on it ends in peace, then it leaves. So nobody waits for ever, and two models
that do not fit together take turns instead of chasing each other out.

A model may grow while it is awake, by an adapter: a ticket with `more_bytes` stands in the same line, is given the
room by the same rules, and is granted when the model has grown.

What never leaves: a model that is pinned, that somebody uses, that is being loaded, or that was loaded for somebody
who has not had it yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from fastchat.errors import ConflictError, FastChatError, ModelNotFoundError, UnavailableError

PATIENCE_S = 5.0

LeaveReason = Literal["evicted", "idle", "operator"]
"""Its memory was wanted, nobody had used it for too long, or an operator sent it away."""


class Place(Enum):
    """Where a model is."""

    ASLEEP = "asleep"
    LOADING = "loading"
    AWAKE = "awake"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Load:
    """To be done now: bring the model's weights into memory, then call `loaded` or `load_failed`."""

    key: str


@dataclass(frozen=True, slots=True)
class Unload:
    """To be done now: free what the model holds, then call `unloaded`. `reason` is why it leaves."""

    key: str
    reason: LeaveReason = field(default="evicted", compare=False)


Action = Load | Unload


@dataclass(eq=False, slots=True)
class Ticket:
    """One request's claim on a model. `failure` is why it will never be granted.

    With `more_bytes` it is granted once the model has grown by so many.
    """

    key: str
    taken_at: float
    more_bytes: int = 0
    is_granted: bool = False
    failure: FastChatError | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the wait is over, one way or the other."""
        return self.is_granted or self.failure is not None


@dataclass(slots=True)
class Resident:
    """One model. `num_bytes` is all that it takes when awake: weights, KV cache and activations."""

    key: str
    num_bytes: int
    place: Place = Place.ASLEEP
    is_pinned: bool = False
    num_granted: int = 0
    last_used_at: float = 0.0
    was_used: bool = False
    is_sent_away: bool = False
    """An operator wants it to leave as soon as nobody uses it."""
    makes_room: bool = False
    """It is to leave as soon as nobody uses it, because somebody has waited long enough for its memory."""

    @property
    def holds_memory(self) -> bool:
        """Whether its bytes are taken, or about to be."""
        return self.place is not Place.ASLEEP

    @property
    def is_open(self) -> bool:
        """Whether a new request may use it now."""
        return self.place is Place.AWAKE and not (self.is_sent_away or self.makes_room)

    @property
    def can_leave(self) -> bool:
        """Whether nothing keeps it in memory."""
        return self.place is Place.AWAKE and not self.is_pinned and self.num_granted == 0


@dataclass(slots=True)
class Residency:
    """All models of one worker against one budget of bytes. `clock` counts seconds and never goes back.

    After every call that changes something, carry out `next_actions`; look again at `next_look_at` even if nothing
    happens. `idle_timeout_s` None keeps idle models until their memory is wanted.
    """

    budget_bytes: int
    clock: Callable[[], float]
    idle_timeout_s: float | None = None
    patience_s: float = PATIENCE_S
    _residents: dict[str, Resident] = field(default_factory=dict)
    _line: list[Ticket] = field(default_factory=list)
    """Tickets that wait, the oldest first."""
    _looked_at: float = -math.inf
    """When the last `next_actions` began: what has come due since then has not been seen."""

    def __iter__(self) -> Iterator[Resident]:
        """All models, in the order in which they were added."""
        return iter(self._residents.values())

    @property
    def used_bytes(self) -> int:
        """What all models in memory take together."""
        return sum(resident.num_bytes for resident in self if resident.holds_memory)

    def add(self, key: str, num_bytes: int) -> None:
        """A model that may be asked for from now on; it is asleep."""
        assert key not in self._residents, f"{key} was added twice"
        self._residents[key] = Resident(key, num_bytes, last_used_at=self.clock())

    def find(self, key: str) -> Resident:
        """Raises `ModelNotFoundError`."""
        try:
            return self._residents[key]
        except KeyError:
            raise ModelNotFoundError(key, list(self._residents)) from None

    def num_waiting(self, key: str) -> int:
        """How many tickets wait for a model."""
        return sum(ticket.key == key for ticket in self._line)

    def take(self, key: str, *, more_bytes: int = 0) -> Ticket:
        """A ticket for a model; already granted where the model is awake and open and need not grow.

        Raises `ModelNotFoundError`, or `UnavailableError` when the model can never fit beside what is pinned.
        """
        resident = self.find(key)
        self.check_can_fit(key, more_bytes=more_bytes)
        ticket = Ticket(key, self.clock(), more_bytes)
        if resident.is_open and not more_bytes:
            self._grant(ticket)
        else:
            self._line.append(ticket)
        return ticket

    def check_can_fit(self, key: str, *, more_bytes: int = 0) -> None:
        """Raise `UnavailableError` for a model that has no room beside what is pinned."""
        resident = self.find(key)
        if self._cannot_fit(resident, more_bytes):
            raise self._never_fits(resident, more_bytes)

    def shrink(self, key: str, num_bytes: int) -> None:
        """A model has given back a part of what it takes, or did not take what it was granted."""
        resident = self.find(key)
        resident.num_bytes -= num_bytes
        assert resident.num_bytes >= 0, f"{key} gave back more than it had"

    def give_back(self, ticket: Ticket) -> None:
        """The request has ended, or waits no more."""
        if ticket.is_granted:
            resident = self.find(ticket.key)
            resident.num_granted -= 1
            resident.last_used_at = self.clock()
            assert resident.num_granted >= 0, f"a ticket for {ticket.key} was given back twice"
        elif ticket in self._line:
            self._line.remove(ticket)

    def unload(self, key: str) -> None:
        """Let a model leave as soon as nobody uses it; whoever asks for it later wakes it again.

        Raises `ConflictError` for a pinned one.
        """
        resident = self.find(key)
        if resident.is_pinned:
            raise ConflictError(f"{key} is pinned in memory; unpin it first.", code="model_pinned")
        resident.is_sent_away = resident.place in (Place.AWAKE, Place.LOADING)

    def pin(self, key: str) -> None:
        """Keep a model in memory once it is there. Raises `UnavailableError` if the pinned would not fit together."""
        resident = self.find(key)
        self.check_can_fit(key)
        resident.is_pinned, resident.is_sent_away = True, False
        self._fail_hopeless()

    def unpin(self, key: str) -> None:
        """Let a model leave again when its memory is wanted."""
        self.find(key).is_pinned = False

    def loaded(self, key: str) -> None:
        """A `Load` has been carried out: everybody who waits for this model goes on."""
        resident = self.find(key)
        assert resident.place is Place.LOADING, f"{key} was {resident.place.value}"
        resident.place = Place.AWAKE
        resident.last_used_at = self.clock()
        self._grant_all(resident)  # also where it was sent away meanwhile: it was loaded for them

    def load_failed(self, key: str, failure: FastChatError) -> None:
        """A `Load` came to nothing: everybody who waits hears why. The next request tries again."""
        resident = self.find(key)
        assert resident.place is Place.LOADING, f"{key} was {resident.place.value}"
        resident.place, resident.is_sent_away = Place.ASLEEP, False
        for ticket in [ticket for ticket in self._line if ticket.key == key]:
            self._fail(ticket, failure)

    def unloaded(self, key: str) -> None:
        """An `Unload` has been carried out."""
        resident = self.find(key)
        assert resident.place is Place.LEAVING, f"{key} was {resident.place.value}"
        resident.place, resident.is_sent_away = Place.ASLEEP, False

    def next_actions(self) -> list[Action]:
        """What is to be done now; the models' places already say so."""
        self._looked_at = self.clock()
        for resident in self:
            resident.makes_room = False  # decided anew: whoever waited for its memory may have left the line
        actions: list[Action] = [
            self._send_away(resident, reason) for resident in self if (reason := self._reason_to_leave(resident))
        ]
        actions += self._serve_line()
        for resident in self:
            if resident.is_open:
                self._grant_all(resident)
        return actions

    def next_look_at(self) -> float | None:
        """When time alone can change something; None: never."""
        times = [ticket.taken_at + self.patience_s for ticket in self._line]
        if self.idle_timeout_s is not None:
            times += [resident.last_used_at + self.idle_timeout_s for resident in self if resident.can_leave]
        return min((time for time in times if time > self._looked_at), default=None)

    def _serve_line(self) -> list[Action]:
        """Load what is wanted, strictly in line: nobody takes the room that is made for somebody before."""
        actions: list[Action] = []
        for ticket in self._waiting_for_memory():
            resident = self._residents[ticket.key]
            if resident.place is Place.LEAVING:
                break  # its bytes must be free before they are taken again
            wanted_bytes = ticket.more_bytes if resident.place is Place.AWAKE else resident.num_bytes
            missing = self.used_bytes + wanted_bytes - self.budget_bytes
            if missing > 0:
                actions += self._make_room(ticket, missing)
                break
            if resident.place is Place.AWAKE:
                self._grow(resident, ticket)
            else:
                resident.place = Place.LOADING
                actions.append(Load(resident.key))
        return actions

    def _waiting_for_memory(self) -> Iterator[Ticket]:
        """Tickets whose model is neither there nor on its way, or must grow; in the order of the line."""
        for ticket in tuple(self._line):
            resident = self._residents[ticket.key]
            is_there = resident.place is Place.LOADING or (resident.place is Place.AWAKE and not ticket.more_bytes)
            # One that is to leave grows when it has come back.
            if not (ticket.is_settled or is_there or (resident.place is Place.AWAKE and not resident.is_open)):
                yield ticket

    def _make_room(self, wanting: Ticket, missing: int) -> list[Action]:
        """Send idle models away, and close busy ones once the one who waits has waited long enough."""
        missing -= sum(resident.num_bytes for resident in self if resident.place is Place.LEAVING)
        others = (resident for resident in self if resident.key != wanting.key)
        candidates = [resident for resident in others if resident.place is Place.AWAKE and not resident.is_pinned]
        is_out_of_patience = self.clock() - wanting.taken_at >= self.patience_s
        actions: list[Action] = []
        # Those that can leave at once come first, then the least recently used.
        for resident in sorted(candidates, key=lambda each: (each.num_granted > 0, each.last_used_at)):
            if missing <= 0:
                break
            missing -= resident.num_bytes
            if resident.can_leave:
                actions.append(self._send_away(resident, "evicted"))
            elif is_out_of_patience:
                resident.makes_room = True
        return actions

    def _reason_to_leave(self, resident: Resident) -> LeaveReason | None:
        """Why it should leave whether or not its memory is wanted; None: it should not."""
        if not resident.can_leave:
            return None
        if resident.is_sent_away:
            return "operator"
        if self.idle_timeout_s is None or self.num_waiting(resident.key):
            return None
        return "idle" if self.clock() - resident.last_used_at >= self.idle_timeout_s else None

    def _send_away(self, resident: Resident, reason: LeaveReason) -> Action:
        assert resident.can_leave
        resident.place = Place.LEAVING
        return Unload(resident.key, reason)

    def _grow(self, resident: Resident, ticket: Ticket) -> None:
        resident.num_bytes += ticket.more_bytes
        self._line.remove(ticket)
        self._grant(ticket)
        self._fail_hopeless()

    def _grant(self, ticket: Ticket) -> None:
        resident = self._residents[ticket.key]
        resident.num_granted += 1
        resident.last_used_at = self.clock()
        resident.was_used = True
        ticket.is_granted = True

    def _grant_all(self, resident: Resident) -> None:
        for ticket in [ticket for ticket in self._line if ticket.key == resident.key and not ticket.more_bytes]:
            self._line.remove(ticket)
            self._grant(ticket)

    def _fail(self, ticket: Ticket, failure: FastChatError) -> None:
        self._line.remove(ticket)
        ticket.failure = failure

    def _fail_hopeless(self) -> None:
        """Tell those who have no room any more beside what is pinned."""
        for ticket in tuple(self._line):
            resident = self.find(ticket.key)
            if self._cannot_fit(resident, ticket.more_bytes):
                self._fail(ticket, self._never_fits(resident, ticket.more_bytes))

    def _cannot_fit(self, resident: Resident, more_bytes: int = 0) -> bool:
        pinned = sum(each.num_bytes for each in self if each.is_pinned and each is not resident)
        return pinned + resident.num_bytes + more_bytes > self.budget_bytes

    def _never_fits(self, resident: Resident, more_bytes: int) -> UnavailableError:
        gib = 2**30
        with_adapter = " with the adapter" if more_bytes else ""
        needed_bytes = resident.num_bytes + more_bytes
        return UnavailableError(
            f"{resident.key}{with_adapter} needs {needed_bytes / gib:.2f} GiB and does not fit into this worker's "
            f"{self.budget_bytes / gib:.2f} GiB beside what is pinned; unpin a model or give the worker "
            f"more {'--adapter-memory' if more_bytes else 'memory'}.",
            code="model_does_not_fit",
        )
