"""The random number of a token: a hash of what names it, so that nothing else in the process moves it. Torch-free."""

from __future__ import annotations

_MASK_64 = (1 << 64) - 1


def random_unit(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing else; SplitMix64 (Steele et al., OOPSLA 2014) over the three."""
    state = _mix(seed & _MASK_64)
    state = _mix((state + choice) & _MASK_64)
    state = _mix((state + position) & _MASK_64)
    return (state >> 11) * 2.0**-53


def _mix(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & _MASK_64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return state ^ (state >> 31)
