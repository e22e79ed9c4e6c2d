"""One relayed request as the metrics see it, whoever asks: a client, or another part of this process."""

from __future__ import annotations

import asyncio
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from fastchat.api.http_edge import ClientLeftError, error_status
from fastchat.errors import FastChatError
from fastchat.gateway.live_table import LiveTable
from fastchat.ops.access_log import CLIENT_LEFT_STATUS
from fastchat.ops.metrics import GatewayMetrics, RequestRelayed


class ObservedRequest:
    """Counted once, by `finish` or by `fail`. `route` is a declared path; `model` is "" until it is known."""

    def __init__(self, route: str, metrics: GatewayMetrics, table: LiveTable, *, model: str = "") -> None:
        self.model = model
        self._route = route
        self._metrics = metrics
        self._table = table
        self._began = time.monotonic()
        self._first_byte_s: float | None = None

    def note_first_byte(self) -> None:
        """The first byte of the answer is there."""
        self._first_byte_s = time.monotonic() - self._began

    def finish(self, status: int) -> None:
        """The request was answered."""
        fact = RequestRelayed(
            self._route, self.model, status, time.monotonic() - self._began, time_to_first_byte_s=self._first_byte_s
        )
        self._metrics.observe_request(fact, self._table.served())

    def fail(self, error: BaseException) -> None:
        """The request ended with `error`, before there was an answer."""
        self.finish(_status_of(error))


def _status_of(error: BaseException) -> int:
    """The status that the edge answers with."""
    if isinstance(error, FastChatError):
        return error_status(error)
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, ClientLeftError | ClientDisconnect):
        return CLIENT_LEFT_STATUS
    return 503 if isinstance(error, asyncio.CancelledError) else 500  # cancelled: the server stops
