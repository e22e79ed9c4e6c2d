"""Adapters as an engine sees them: small changes of its one model that a sequence asks for by name. Torch-free.

What a change is, and how it is computed, only the model's side knows (`AdapterHost`). The engine tells it before each
step which rows of the packed batch are whose.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastchat.errors import CheckpointError

_numbers = itertools.count(1)


class Change(Protocol):
    """What the model's side has read. A prefix is keys and values in front of every sequence, at no positions."""

    @property
    def num_prefix_slots(self) -> int:
        """The slots of the KV cache that a prefix takes; 0 where there is none."""

    @property
    def prefix(self) -> Any:  # Any: two tensors, which this file does not know
        """Its keys and its values. # (num_layers, num_kv_heads, num_prefix_slots, head_dim)"""


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """Rows [start, stop) of a step's packed batch are computed with a change of the model's side."""

    change: Any  # Any: a `Change`, of which the model's side knows more
    start: int
    stop: int


class AdapterHost(Protocol):
    """A model that can be changed for some rows of a batch."""

    def load(self, source: str) -> Change:
        """Read a change. Raises `CheckpointError` in one line for what does not fit the model."""

    def use(self, rows: Sequence[AdapterRows]) -> None:
        """Compute the next forward pass so: rows that are not named are the model's own."""


@dataclass(frozen=True, eq=False, slots=True)
class Adapter:
    """One loaded adapter. Who holds it keeps its numbers in memory, whether or not it can still be asked for.

    `number` never comes twice, so what was computed with an adapter is never taken for another one's of that name.
    """

    name: str
    change: Change
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """To be done between two steps: load `source` under `name`, or with "" remove that name. `number` is answered."""

    number: int
    name: str
    source: str = ""


class AdapterTable:
    """The adapters of one engine that can be asked for."""

    def __init__(self, host: AdapterHost | None) -> None:
        self.host = host
        self._adapters: dict[str, Adapter] = {}
        self._missing: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<AdapterTable {list(self._adapters)}>"

    def add(self, name: str, source: str) -> Adapter:
        """Load an adapter; sequences may ask for it from now on. Raises `CheckpointError`."""
        if self.host is None:
            raise CheckpointError(f"{source}: this engine takes no adapters; merge it into its base model")
        if name in self._adapters:
            raise CheckpointError(f"{source}: an adapter named {name!r} is loaded already; remove that one first")
        adapter = self._adapters[name] = Adapter(name, self.host.load(source))
        return adapter

    def miss(self, name: str, reason: str) -> None:
        """It could not be loaded; whoever asks for it is told why."""
        self._missing[name] = reason

    def why_not(self, name: str) -> str:
        """Why there is no adapter of that name."""
        return self._missing.get(name) or f"the adapter {name!r} was removed"

    def remove(self, name: str) -> None:
        """Nobody may ask for it any more; what runs with it goes on. An unknown name is no fault."""
        self._missing.pop(name, None)
        if self._adapters.pop(name, None) is not None and self.host is not None:
            self.host.use(())  # the rows of the last step hold it

    def find(self, name: str) -> Adapter | None:
        """The adapter of that name, None where there is none."""
        return self._adapters.get(name)
