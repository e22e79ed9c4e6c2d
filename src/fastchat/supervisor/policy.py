"""When a process that died is started again, and when it is given up. Decides only: no process, no clock of its own.

    died after           delay before the next start
    60 s of health       0.5 s, the count begins anew
    less                 0.5 s, 1 s, 2 s, ... 30 s

Given up: five deaths within 60 s; and five in a row of a process that never became ready, because loading a large
model takes longer than a minute and no window on the clock would ever see it flap.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """The numbers of the policy; times are in seconds."""

    first_delay_s: float = 0.5
    max_delay_s: float = 30.0
    healthy_after_s: float = 60.0
    max_deaths: int = 5
    window_s: float = 60.0


class RestartPolicy:
    """What is known of one process's deaths. All times are of one monotonic clock."""

    def __init__(self, limits: RestartLimits) -> None:
        self._limits = limits
        self._deaths_at: deque[float] = deque(maxlen=limits.max_deaths)
        self._num_in_a_row = 0
        self._num_unready_in_a_row = 0

    def __repr__(self) -> str:
        return f"<RestartPolicy num_in_a_row={self._num_in_a_row}>"

    def note_death(self, now: float, *, ready_at: float | None) -> float | None:
        """The seconds to wait before the next start; None when the process is given up.

        `ready_at` is when the process that died became ready, None where it never did.
        """
        limits = self._limits
        if ready_at is not None and now - ready_at >= limits.healthy_after_s:
            self._num_in_a_row = 0
            self._deaths_at.clear()
        self._num_in_a_row += 1
        self._num_unready_in_a_row = 0 if ready_at is not None else self._num_unready_in_a_row + 1
        self._deaths_at.append(now)
        is_flapping = len(self._deaths_at) == limits.max_deaths and now - self._deaths_at[0] <= limits.window_s
        if is_flapping or self._num_unready_in_a_row >= limits.max_deaths:
            return None
        return min(limits.first_delay_s * 2.0 ** (self._num_in_a_row - 1), limits.max_delay_s)
