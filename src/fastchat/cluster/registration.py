"""A worker's control connection: who it is, how it fares each second, and what each request cost.

The connection is the worker's life sign: when it closes, the controller drops the worker at once. Here it is kept open
through restarts of the controller, and no final record is lost or counted twice meanwhile.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Literal

import aiohttp
import structlog
from pydantic import TypeAdapter, ValidationError

from fastchat.cluster.attempts import CONNECT_LIMIT_S, Attempts
from fastchat.cluster.contract import (
    CONNECT_PATH,
    Acknowledge,
    ControllerMessage,
    FinalRecord,
    Goodbye,
    Hello,
    Load,
    Message,
    ModelEntry,
    Models,
    Progress,
    Refused,
    Welcome,
)
from fastchat.config import dial_url

PROGRESS_INTERVAL_S = 1.0
WELCOME_LIMIT_S = 10.0
FLUSH_LIMIT_S = 2.0
MAX_RECORDS = 10_000
_DROPS_PER_LINE = 1000

_log = structlog.stdlib.get_logger(__name__)
_controller_message: TypeAdapter[Welcome | Acknowledge | Refused] = TypeAdapter(ControllerMessage)


class _RefusedError(Exception):
    """The controller's `Refused`, with its reason."""


class ControlConnection:
    """Keeps a worker in the controller's table. Owned by one event loop.

    `hello.worker_id` must be new for each process, because records are counted per worker id. `get_load` is called each
    second and must not block.
    """

    def __init__(
        self,
        *,
        controller_address: str,
        token: str,
        hello: Hello,
        get_load: Callable[[], Load],
        max_records: int = MAX_RECORDS,
        welcome_limit_s: float = WELCOME_LIMIT_S,
    ) -> None:
        self._url = dial_url(controller_address) + CONNECT_PATH
        self._headers = {"Authorization": f"Bearer {token}"}
        self._hello = hello
        self._get_load = get_load
        self._max_records = max_records
        self._welcome_limit_s = welcome_limit_s
        self._attempts = Attempts(controller_address)
        self._records: deque[FinalRecord] = deque()  # not acknowledged yet, oldest first
        self._num_sent = 0  # how many of them went out on the present connection
        self._last_number = 0
        self._num_dropped = 0
        self._is_draining = False
        self._has_said_goodbye = False
        self._reports_now = False
        self._has_new_models = False
        self._wake = asyncio.Event()
        self._settled = asyncio.Event()
        self._settled.set()
        self.is_connected = False
        """Whether the controller has this worker in its table, as far as is known here."""

    def __repr__(self) -> str:
        state = "connected" if self.is_connected else "waiting"
        return f"<ControlConnection {state} num_records={len(self._records)}>"

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[None]:
        """While the block runs, the worker is registered whenever the controller is there.

        Leaving it says goodbye, waits a moment until all records are acknowledged, and closes.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_LIMIT_S)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            task = asyncio.get_running_loop().create_task(self._run(session))
            try:
                yield
            finally:
                self.drain()
                await self._flush()
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    def add_record(
        self,
        *,
        request_id: str,
        tenant: str,
        model: str,
        num_prompt_tokens: int,
        num_cached_tokens: int,
        num_generated_tokens: int,
        reason: Literal["stop", "length", "abort", "error"],
    ) -> None:
        """Queue what one request cost, until the controller acknowledges it. Never blocks.

        When the queue is full the oldest record is dropped, with an error in the log.
        """
        if len(self._records) >= self._max_records:
            self._drop_oldest()
        self._last_number += 1
        self._records.append(
            FinalRecord(
                number=self._last_number,
                request_id=request_id,
                tenant=tenant,
                model=model,
                num_prompt_tokens=num_prompt_tokens,
                num_cached_tokens=num_cached_tokens,
                num_generated_tokens=num_generated_tokens,
                reason=reason,
            )
        )
        self._settled.clear()
        self._wake.set()

    def drain(self) -> None:
        """Say goodbye: no new requests for this worker, now and after any reconnect."""
        self._is_draining = True
        self._wake.set()

    def report_now(self) -> None:
        """Send progress at once instead of within the second: something changed that others should know."""
        self._reports_now = True
        self._wake.set()

    def announce(self, models: tuple[ModelEntry, ...]) -> None:
        """Tell at once what is served from now on, and again after any reconnect."""
        self._hello = self._hello.model_copy(update={"models": models})
        self._has_new_models = True
        self.report_now()  # with the states of what is new

    async def _run(self, session: aiohttp.ClientSession) -> None:
        while True:
            try:
                await self._live_once(session)
            except _RefusedError as error:
                self._attempts.note_refusal(str(error))
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                self._attempts.note_failure(error)
            except Exception:  # noqa: BLE001 - the loop must live on, without it the worker is lost to the cluster
                _log.exception("control connection failed")
            await self._attempts.wait()

    async def _live_once(self, session: aiohttp.ClientSession) -> None:
        """One connection, from the handshake to its end."""
        async with self._welcomed(session) as socket:
            names = ",".join(model.name for model in self._hello.models)
            self._attempts.note_success("registered with the controller", models=names, address=self._hello.address)
            self._num_sent = 0
            self._has_said_goodbye = False
            self.is_connected = True
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._write(socket))
                    await self._read(socket)
            finally:
                self.is_connected = False
        raise ConnectionResetError("the connection was closed")

    @asynccontextmanager
    async def _welcomed(self, session: aiohttp.ClientSession) -> AsyncIterator[aiohttp.ClientWebSocketResponse]:
        """A connection on which the controller has answered; one that takes it and says nothing is given up."""
        async with AsyncExitStack() as stack:
            async with asyncio.timeout(self._welcome_limit_s):
                connecting = session.ws_connect(self._url, headers=self._headers, heartbeat=10.0, autoping=True)
                socket = await stack.enter_async_context(connecting)
                await _send(socket, self._hello)
                answer = _parse(await socket.receive())
            if isinstance(answer, Refused):
                raise _RefusedError(answer.reason)
            if not isinstance(answer, Welcome):
                raise ConnectionResetError("the controller closed the connection without a welcome")
            yield socket

    async def _read(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Take acknowledgements until the connection ends, then let the writer end too."""
        try:
            async for frame in socket:
                message = _parse(frame)
                if isinstance(message, Acknowledge):
                    self._acknowledge(message.number)
                elif isinstance(message, Refused):
                    self._attempts.note_refusal(message.reason)
        except ConnectionResetError as error:
            _log.warning("control connection ended", reason=str(error))
        finally:
            await socket.close()
            self._wake.set()

    async def _write(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Send progress each second, and records and goodbye as they come, until the connection ends."""
        loop = asyncio.get_running_loop()
        next_progress_at = loop.time()
        with suppress(ConnectionError, aiohttp.ClientError):
            while not socket.closed:
                self._wake.clear()
                if self._is_draining and not self._has_said_goodbye:
                    await _send(socket, Goodbye())
                    self._has_said_goodbye = True
                if self._has_new_models:
                    self._has_new_models = False
                    await _send(socket, Models(models=self._hello.models))
                while self._num_sent < len(self._records):
                    self._num_sent += 1
                    await _send(socket, self._records[self._num_sent - 1])
                if self._reports_now or loop.time() >= next_progress_at:
                    self._reports_now = False
                    await _send(socket, Progress(load=self._get_load()))
                    next_progress_at = loop.time() + PROGRESS_INTERVAL_S
                await self._sleep_until(next_progress_at)
        await socket.close()

    async def _sleep_until(self, moment: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout_at(moment):
                await self._wake.wait()

    def _acknowledge(self, number: int) -> None:
        while self._records and self._records[0].number <= number:
            self._records.popleft()
            self._num_sent = max(0, self._num_sent - 1)
        if not self._records:
            self._settled.set()

    def _drop_oldest(self) -> None:
        record = self._records.popleft()
        self._num_sent = max(0, self._num_sent - 1)
        if self._num_dropped % _DROPS_PER_LINE == 0:
            _log.error("usage record dropped, too many wait for the controller", request_id=record.request_id)
        self._num_dropped += 1

    async def _flush(self) -> None:
        """Wait a moment until what is queued is acknowledged."""
        try:
            async with asyncio.timeout(FLUSH_LIMIT_S):
                await self._settled.wait()
        except TimeoutError:
            _log.error("usage records lost, the controller is away", num_records=len(self._records))


async def _send(socket: aiohttp.ClientWebSocketResponse, message: Message) -> None:
    await socket.send_str(message.model_dump_json())


def _parse(frame: aiohttp.WSMessage) -> Welcome | Acknowledge | Refused | None:
    """A message of the controller's; None for a closed connection. A broken message ends the connection."""
    if frame.type is not aiohttp.WSMsgType.TEXT:
        return None
    try:
        return _controller_message.validate_json(frame.data)
    except ValidationError as error:
        raise ConnectionResetError(f"the controller sent what is no message: {error.error_count()} errors") from error
