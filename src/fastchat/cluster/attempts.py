"""How a process waits for the controller: quietly, evenly, and saying once what it waits for."""

from __future__ import annotations

import asyncio

import aiohttp
import structlog

from fastchat.cluster.token import TOKEN_HINT

FIRST_DELAY_S = 0.25
MAX_DELAY_S = 0.5
CONNECT_LIMIT_S = 2.0

_log = structlog.stdlib.get_logger(__name__)


class Attempts:
    """The tries of one connection to the controller: one line when waiting begins, one when it ends."""

    def __init__(self, controller_address: str) -> None:
        self._controller_address = controller_address
        self._delay_s = FIRST_DELAY_S
        self._told = ""

    def note_failure(self, error: Exception) -> None:
        """The controller is not there, or its connection broke."""
        if isinstance(error, aiohttp.WSServerHandshakeError | aiohttp.ClientResponseError) and error.status == 401:
            self.note_refusal(f"the controller does not accept this cluster token; {TOKEN_HINT}")
        elif isinstance(error, aiohttp.ClientSSLError):
            self.note_refusal(
                f"TLS with the controller failed: {error}; its certificate must be trusted (SSL_CERT_FILE)"
            )
        elif not self._told:
            self._told = "waiting"
            reason = str(error) or type(error).__name__
            _log.info("waiting for the controller", controller=self._controller_address, reason=reason)

    def note_refusal(self, reason: str) -> None:
        """The controller is there and will not have us; told again only when the reason changes."""
        if reason != self._told:
            self._told = reason
            _log.error("refused by the controller", controller=self._controller_address, reason=reason)

    def note_success(self, event: str, **facts: object) -> None:
        """The connection stands; said in one line, and the next failure will be said again."""
        self._told = ""
        self._delay_s = FIRST_DELAY_S
        _log.info(event, controller=self._controller_address, **facts)

    async def wait(self) -> None:
        """Until the next try."""
        await asyncio.sleep(self._delay_s)
        self._delay_s = min(2 * self._delay_s, MAX_DELAY_S)
