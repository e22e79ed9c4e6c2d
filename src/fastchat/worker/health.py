"""Whether engines live and move. A long step moves too, layer by layer, so only a real hang looks like one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fastchat.api.served_model import ServedModel
from fastchat.cluster.contract import Load
from fastchat.engine.events import EngineStats

ENGINE_DIED = "an engine died"


@dataclass(slots=True)
class _Watch:
    model: ServedModel
    progress: int = -1
    moved_at: float = 0.0

    @property
    def stats(self) -> EngineStats:
        return self.model.engine.stats

    @property
    def num_pending(self) -> int:
        """Sequences that the engine knows of, or that it has not even taken note of yet."""
        return max(self.stats.num_running + self.stats.num_waiting, self.model.engine.num_open)


class EngineHealth:
    """Looks at engines whenever it is asked; `clock` counts seconds and never goes back."""

    def __init__(self, models: Iterable[ServedModel], clock: Callable[[], float], *, hang_after_s: float) -> None:
        self._watches = [_Watch(model) for model in models]
        self._clock = clock
        self._hang_after_s = hang_after_s
        self._last_load = Load()
        self._num_looks = 0

    def problem(self) -> str | None:
        """What is wrong, in a phrase; None when all engines live and move or have nothing to do."""
        problems = [problem for watch in self._watches if (problem := self._look(watch))]
        return problems[0] if problems else None

    def load(self) -> Load:
        """All engines together. While one of them hangs the progress stands still, whatever the others do."""
        has_problem = self.problem() is not None
        stats = [watch.stats for watch in self._watches]
        num_running = sum(each.num_running for each in stats)
        # What waits for its model's turn makes no steps, and must not look like a hang from afar.
        self._num_looks += any(watch.num_pending and not watch.model.engine.is_computing for watch in self._watches)
        self._last_load = Load(
            progress=self._last_load.progress
            if has_problem
            else self._num_looks + sum(each.progress for each in stats),
            num_running=num_running,
            num_waiting=max(0, sum(watch.num_pending for watch in self._watches) - num_running),
            num_queued_tokens=sum(each.num_queued_tokens for each in stats),
        )
        return self._last_load

    def _look(self, watch: _Watch) -> str | None:
        if not watch.model.engine.is_alive:
            return ENGINE_DIED
        now = self._clock()
        engine, progress = watch.model.engine, watch.stats.progress
        # While another has the device it is that one's move, and that one is looked at too.
        can_move = watch.num_pending > 0 and engine.is_computing and not engine.awaits_turn
        if progress != watch.progress or not can_move:
            watch.progress, watch.moved_at = progress, now
        return "an engine hangs" if now - watch.moved_at > self._hang_after_s else None
