"""The served chat models for other parts of this process: who is there, and a stream from one of them.

What such a part asks for goes the way of every request: same choice of a worker, same second try, same metrics.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from fastchat.api.http_edge import bearer_key
from fastchat.errors import ModelNotFoundError
from fastchat.gateway.admission import admit_chat
from fastchat.gateway.answers import RelayedStream, WholeAnswer
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.observed_request import ObservedRequest
from fastchat.gateway.relay import Relay, Sender
from fastchat.ops.access_log import CLIENT_LEFT_STATUS
from fastchat.ops.keys import ApiKeys
from fastchat.ops.metrics import GatewayMetrics

_USER_AGENT = "fastchat"


class ChatDoor:
    """Opened by the app for the parts mounted in it."""

    def __init__(self, *, relay: Relay, table: LiveTable, keys: ApiKeys, metrics: GatewayMetrics) -> None:
        self._relay = relay
        self._table = table
        self._keys = keys
        self._metrics = metrics

    def tenant_of(self, request: Request) -> str:
        """Who sends `request`, as an opaque id."""
        return self._keys.tenant_of(bearer_key(request.scope) or "")

    def check_served(self, model: str) -> None:
        """Raise `ModelNotFoundError` for a model that nobody serves, `UnavailableError` for one that left."""
        self._table.current()
        served = self._table.served()
        if model not in served:
            raise self._table.explain(ModelNotFoundError(model, served))

    def distinct_models(self) -> list[str]:
        """The models that can be chatted with now, each once: by its first name where it has several."""
        return sorted(
            {
                model.alias_of or model.name
                for worker in self._table.current().workers
                if worker.state == "ready"
                for model in worker.models
                if "chat" in model.capabilities
            }
        )

    async def open_chat(self, document: dict[str, Any], *, tenant: str, is_secret: bool) -> ChatEvents:  # Any: JSON
        """The events of a streamed chat completion; `is_secret` keeps the model's name out of the metrics.

        Raises `FastChatError` where no worker can answer. A worker's refusal is an event with an `error`.
        """
        request = admit_chat(document)
        observed = ObservedRequest(request.path, self._metrics, self._table, model="" if is_secret else request.model)
        sender = Sender(request_id=secrets.token_hex(16), tenant=tenant, user_agent=_USER_AGENT)
        try:
            answer = await self._relay.ask(request, sender, "chat")
        except asyncio.CancelledError:
            observed.finish(CLIENT_LEFT_STATUS)  # who asked this process has left it
            raise
        except BaseException as error:
            observed.fail(error)
            raise
        if isinstance(answer, RelayedStream):
            observed.note_first_byte()
            answer.on_close(lambda: observed.finish(200))
            return ChatEvents(answer)
        observed.finish(answer.status)
        return ChatEvents(answer)


class ChatEvents:
    """Whole events, several at a time. Closing it ends the answer on its worker."""

    def __init__(self, answer: WholeAnswer | RelayedStream) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        if isinstance(self._answer, WholeAnswer):
            yield b"data: " + self._answer.body.replace(b"\n", b" ") + b"\n\n"
            return
        async for events in self._answer:
            yield events

    async def aclose(self) -> None:
        """Release the worker; needs no waiting."""
        if isinstance(self._answer, RelayedStream):
            await self._answer.aclose()
