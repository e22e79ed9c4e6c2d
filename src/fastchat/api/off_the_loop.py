"""Work that may take long goes to a thread, so that it holds up nobody else's stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_LARGE = 2000
"""Characters; a tokenizer takes about a millisecond for so many, and a thread costs a tenth of that."""


async def off_the_loop(work: Callable[[], T], *, size: int) -> T:
    """The result of `work`, computed in a thread when `size` (characters, ids or values) is large."""
    return work() if size < _LARGE else await asyncio.to_thread(work)
