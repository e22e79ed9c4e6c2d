"""The adapters of one base, whether the base is in memory or asleep: what its next engine loads, and who uses which.

An adapter that was removed stays until the last request that asked for it has ended. Torch-free.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from fastchat.errors import UnavailableError


@dataclass(eq=False, slots=True)
class HeldAdapter:
    """One adapter. `key` is what the engine calls it, `num_bytes` what its numbers take in memory."""

    key: str
    source: str
    num_bytes: int
    num_users: int = 0
    is_retired: bool = False


class PresentAdapters:
    """All adapters of one base. `on_unused` is called when the last user of a retired one has gone."""

    def __init__(self, held: Iterable[HeldAdapter] = ()) -> None:
        self._held = {each.key: each for each in held}
        self._numbers = itertools.count(1)
        self.were_loaded = False
        """Whether an engine was made with them: one that is lost later does not keep the base from waking."""
        self.on_unused: Callable[[HeldAdapter], object] = lambda _: None

    def __repr__(self) -> str:
        users = {each.key: each.num_users for each in self._held.values()}
        return f"<PresentAdapters {users}>"

    @property
    def sources(self) -> tuple[tuple[str, str], ...]:
        """(key, folder) of each, as an engine takes them."""
        return tuple((each.key, each.source) for each in self._held.values())

    def free_key(self, name: str) -> str:
        """A key that no other adapter gets: a name may be added again while a removed one of that name still runs."""
        key = f"{name}#{next(self._numbers)}"
        return key if key not in self._held else self.free_key(name)

    def add(self, adapter: HeldAdapter) -> None:
        """The engine there is has it, and those after it will."""
        assert adapter.key not in self._held, f"{adapter.key} is there twice"
        self._held[adapter.key] = adapter

    def retire(self, key: str) -> HeldAdapter:
        """It is to go as soon as nobody uses it."""
        adapter = self._held[key]
        adapter.is_retired = True
        return adapter

    def drop(self, adapter: HeldAdapter) -> None:
        """Engines from now on do without it."""
        assert adapter.num_users == 0, f"{adapter.key} is in use"
        del self._held[adapter.key]

    @contextmanager
    def used(self, key: str) -> Iterator[None]:
        """Keep it while the block lasts; "" is the base itself. Raises `UnavailableError` for one that has gone."""
        if not key:
            yield
            return
        adapter = self._held.get(key)
        if adapter is None:
            message = "The adapter was removed while this request was on its way; send it again."
            raise UnavailableError(message, code="adapter_removed")
        adapter.num_users += 1
        try:
            yield
        finally:
            adapter.num_users -= 1
            if adapter.is_retired and adapter.num_users == 0:
                self.on_unused(adapter)
