"""The controller's end of a worker's control connection: check, register, listen, forget."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
import structlog
from fastapi import WebSocket, WebSocketDisconnect
from pydantic import TypeAdapter, ValidationError

from fastchat.cluster.address_check import check_worker
from fastchat.cluster.contract import (
    PROTOCOL_VERSION,
    Acknowledge,
    FinalRecord,
    Goodbye,
    Hello,
    Message,
    Models,
    Progress,
    Refused,
    Welcome,
    WorkerMessage,
)
from fastchat.cluster.dial_rules import DialRules
from fastchat.cluster.table import Registration, WorkerTable
from fastchat.cluster.usage import UsageLedger
from fastchat.errors import InvalidRequestError, RequestError
from fastchat.gateway.record_inbox import RecordInbox

HELLO_LIMIT_S = 10.0
_TRY_AGAIN_LATER = 1013  # close code of RFC 6455's registry
_MAX_REASON_CHARACTERS = 500

_log = structlog.stdlib.get_logger(__name__)
_worker_message: TypeAdapter[Hello | Models | Progress | FinalRecord | Goodbye] = TypeAdapter(WorkerMessage)


@dataclass(frozen=True, slots=True)
class Reception:
    """What a control connection needs of the controller. `ledger_turn` is held by the one that writes the ledger."""

    table: WorkerTable
    ledger: UsageLedger
    ledger_turn: asyncio.Lock
    session: aiohttp.ClientSession
    rules: DialRules

    async def serve(self, socket: WebSocket) -> None:
        """One worker's connection from its first message to its end. The guard has checked the token."""
        await socket.accept()
        try:
            registration = await self._admit(socket)
            if registration is not None:
                await self._listen(socket, registration)
        except (WebSocketDisconnect, RuntimeError):
            # RuntimeError is Starlette's for a send after the other side has closed.
            _log.debug("control connection closed early")

    async def _admit(self, socket: WebSocket) -> Registration | None:
        """The worker's place in the table, or None after it was told why not."""
        try:
            async with asyncio.timeout(HELLO_LIMIT_S):
                hello = await _next_message(socket)
            registration = await self._register(hello, socket.client.host if socket.client else "")
        except TimeoutError:
            await _refuse(socket, f"no hello within {HELLO_LIMIT_S:.0f} s")
            return None
        except RequestError as error:
            await _refuse(socket, error.message)
            return None
        return registration

    async def _register(self, hello: Message, peer: str) -> Registration:
        if not isinstance(hello, Hello):
            raise InvalidRequestError("the first message must be a hello")
        if hello.protocol != PROTOCOL_VERSION:
            raise InvalidRequestError(
                f"the worker speaks protocol {hello.protocol} and the controller {PROTOCOL_VERSION}; "
                "run the same version of fastchat everywhere"
            )
        self.table.check_free(hello.worker_id)
        await check_worker(self.session, self.rules, hello.address, worker_id=hello.worker_id, peer=peer)
        return self.table.register(hello)

    async def _listen(self, socket: WebSocket, registration: Registration) -> None:
        names = ",".join(model.name for model in registration.models)
        _log.info("worker registered", worker_id=registration.worker_id, address=registration.address, models=names)

        async def acknowledge(number: int) -> None:
            with suppress(WebSocketDisconnect, RuntimeError):  # whoever listens hears of the connection's end
                await _send(socket, Acknowledge(number=number))

        inbox = RecordInbox(self.ledger, self.ledger_turn, registration.worker_id, acknowledge)
        async with inbox.keep_open():  # around all: a worker that is gone leaves the table before its records are kept
            reason = "connection closed"
            try:
                await _send(socket, Welcome())
                while self.table.holds(registration):
                    self._take(registration, inbox, await _next_message(socket))
                reason = "replaced by another connection"
                await _refuse(socket, "another connection took over this worker id")
            except RequestError as error:
                reason = error.message
                await _refuse(socket, reason)
            finally:
                self.table.remove(registration)
                _log.info("worker gone", worker_id=registration.worker_id, address=registration.address, reason=reason)

    def _take(self, registration: Registration, inbox: RecordInbox, message: Message) -> None:
        if isinstance(message, Progress):
            self.table.report(registration, message.load)
        elif isinstance(message, Models):
            names = ",".join(model.name for model in message.models)
            _log.info("worker serves other models", worker_id=registration.worker_id, models=names)
            self.table.change_models(registration, message.models)
        elif isinstance(message, FinalRecord):
            self.table.hear(registration)
            inbox.put(message)
        elif isinstance(message, Goodbye):
            _log.info("worker drains", worker_id=registration.worker_id, address=registration.address)
            self.table.drain(registration)
        else:
            raise InvalidRequestError("a worker says hello once")


async def _next_message(socket: WebSocket) -> Message:
    try:
        text = await socket.receive_text()
    except KeyError:  # Starlette's for a frame of bytes
        raise InvalidRequestError("not a message of this protocol: a frame of bytes") from None
    try:
        return _worker_message.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequestError(f"not a message of this protocol: {where}: {first['msg']}") from error


async def _send(socket: WebSocket, message: Message) -> None:
    await socket.send_text(message.model_dump_json())


async def _refuse(socket: WebSocket, reason: str) -> None:
    _log.warning("worker refused", reason=reason)
    with suppress(WebSocketDisconnect, RuntimeError):
        await _send(socket, Refused(reason=reason[:_MAX_REASON_CHARACTERS]))
        await socket.close(_TRY_AGAIN_LATER)
