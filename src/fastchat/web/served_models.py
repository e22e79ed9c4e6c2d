"""Which models can be chosen: asked of the API server once for all browsers, and only while one is open."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

import structlog

from fastchat.errors import FastChatError, UnavailableError
from fastchat.web.api_client import ApiClient
from fastchat.web.config import ModelListMode
from fastchat.web.model_states import ModelStates

FRESH_S = 1.5
"""How old a list may be that is shown."""

_log = structlog.stdlib.get_logger(__name__)


class ServedModels:
    """The newest list, and whether the API server answers."""

    def __init__(self, client: ApiClient, *, mode: ModelListMode, expected: tuple[str, ...] = ()) -> None:
        self._client = client
        self._states = ModelStates(client)
        self._mode = mode
        self._expected = expected
        self._seen: set[str] = set()
        self._asked_at: float | None = None
        self._turn = asyncio.Lock()
        self.names: tuple[str, ...] = ()
        self.is_reachable = True

    @property
    def loading(self) -> tuple[str, ...]:
        """Models that were announced and have not been served yet."""
        return tuple(name for name in self._expected if name not in self._seen)

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """What a browser is told."""
        absences = {name: asdict(each) for name, each in self._states.absences.items() if name in self.names}
        return {
            "models": list(self.names),
            "absences": absences,
            "loading": list(self.loading),
            "is_reachable": self.is_reachable,
        }

    async def refresh(self) -> None:
        """Ask again, unless that was just done, or the first list is to be kept."""
        async with self._turn:  # browsers that come together share one answer
            if self._asked_at is not None and time.monotonic() - self._asked_at < FRESH_S:
                return
            if self._mode == "reload" or not self.names:
                await self._ask()
            if self.names:
                await self._states.refresh()
            self._asked_at = time.monotonic()

    async def _ask(self) -> None:
        try:
            names = await self._client.list_models()
        except FastChatError as error:
            is_waiting = isinstance(error, UnavailableError) and error.code == "no_controller"
            if self.is_reachable and not is_waiting:
                _log.warning("the list of models could not be read", reason=error.message)
            self.names, self.is_reachable = (), is_waiting
            return
        if names != self.names:
            _log.info("models", served=",".join(names))
        self.names, self.is_reachable = names, True
        self._seen.update(names)
