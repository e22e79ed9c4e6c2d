"""Which of the served models are not in memory: asked of the API server, which tells whose key may know.

What cannot be learnt counts as in memory: the page shows the model as any other, and its first answer takes longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from fastchat.errors import FastChatError, RequestError
from fastchat.web.api_client import ApiClient

PATH = "/api/v1/models"
ASK_LIMIT_S = 1.0
"""How long the list of models waits for this; a worker that hangs holds its answer up."""
REFUSED_FOR_S = 60.0
"""How long a refusal is believed: keys and their rights change."""
_DISTANCES = {"loading": 1, "asleep": 2, "leaving": 2}
"""From memory; what is not named here answers at once, or nobody knows better."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Absence:
    """A model that is served and not in memory: its next request brings it there. `percent` has been read."""

    state: Literal["asleep", "loading"]
    percent: int


class ModelStates:
    """The models that are not in memory, by name. Waits at most `limit_s` for each answer."""

    def __init__(self, client: ApiClient, *, limit_s: float = ASK_LIMIT_S) -> None:
        self._client = client
        self._limit_s = limit_s
        self._refused_until = 0.0
        self.absences: dict[str, Absence] = {}

    async def refresh(self) -> None:
        """Ask again, unless that was refused a moment ago."""
        if time.monotonic() < self._refused_until:
            return
        try:
            async with asyncio.timeout(self._limit_s):
                self.absences = absences(await self._client.get_json(PATH, {}))
        except TimeoutError:
            return  # as it was
        except FastChatError as error:
            self.absences = {}
            if isinstance(error, RequestError):  # another server, or a key that may not know
                self._refused_until = time.monotonic() + REFUSED_FOR_S
                _log.debug("the states of models are not told", reason=error.message)


def absences(document: Any) -> dict[str, Absence]:  # Any: JSON
    """Of each name that no replica has in memory, how its nearest replica fares."""
    nearest: dict[str, tuple[int, Absence]] = {}
    for row in _rows(document):
        state, progress = row.get("state"), row.get("progress")
        percent = int(100 * progress) if isinstance(progress, int | float) and 0 <= progress <= 1 else 0
        distance = _DISTANCES.get(state, 0) if isinstance(state, str) else 0
        found = distance, Absence("loading" if distance == 1 else "asleep", percent)
        for name in _names(row):
            nearest[name] = min(nearest.get(name, found), found, key=lambda each: (each[0], -each[1].percent))
    return {name: absence for name, (distance, absence) in nearest.items() if distance}


def _rows(document: Any) -> Iterator[Mapping[str, Any]]:
    rows = document.get("data") if isinstance(document, dict) else None
    yield from (row for row in rows or () if isinstance(row, dict))


def _names(row: Mapping[str, Any]) -> Iterator[str]:
    """The model's own, and those of the adapters that come and go with it."""
    lists = (row.get("aliases"), row.get("adapters"))
    names = (row.get("id"), *(name for names in lists if isinstance(names, list) for name in names))
    yield from (name for name in names if isinstance(name, str))
