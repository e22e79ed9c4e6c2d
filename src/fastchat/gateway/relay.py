"""From an admitted request to a worker's answer: choose, ask, and ask another one where the first was lost.

While nothing has been sent another worker gets the same request. After that it gets it in the resume form, with the
ids that the client has, and goes on where the lost one ended (`resumption.py`).

A worker gets the client's bytes and our headers, never the client's key nor headers of its own that look like ours. No
worker is asked twice, and after two of them died over a request no third one is asked: the request may be the cause.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from http import HTTPStatus

import structlog

from fastchat.cluster.contract import (
    COUNTED_HEADER,
    CREATED_HEADER,
    REQUEST_ID_HEADER,
    RESUME_HEADER,
    SEED_HEADER,
    TAGS_HEADER,
    TENANT_HEADER,
    WorkerEntry,
)
from fastchat.cluster.dispatch import Capability, Dispatcher
from fastchat.errors import FastChatError, UnavailableError
from fastchat.gateway.admission import AdmittedRequest
from fastchat.gateway.answers import (
    BAD_ANSWER,
    SHUTTING_DOWN,
    RelayedStream,
    WholeAnswer,
    bad_answer,
    passed_headers,
    read_whole_answer,
)
from fastchat.gateway.exchange import LOST, Exchange, Exchanges
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.resumption import num_emitted_ids, resume_body
from fastchat.gateway.worker_http import WorkerHttp

MAX_LOST_WORKERS = 2

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sender:
    """Who asks: our id of the request, the tenant, and how the client names itself."""

    request_id: str
    tenant: str
    user_agent: str


@dataclass(slots=True)
class _Asked:
    """A request on its way: what every worker is told alike, and who was tried.

    `num_counted` are the answer ids that the final record of a worker that shut down has; a lost one leaves no record.
    """

    request: AdmittedRequest
    sender: Sender
    capability: Capability | None
    created: int = field(default_factory=lambda: int(time.time()))
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    tried: set[str] = field(default_factory=set)
    num_lost: int = 0
    num_counted: int | None = None


class Relay:
    """Sends requests to workers. `on_retry` is told of every request that goes to one more worker."""

    def __init__(
        self,
        *,
        http: WorkerHttp,
        table: LiveTable,
        dispatcher: Dispatcher,
        exchanges: Exchanges,
        cluster_token: str,
        on_retry: Callable[[], None],
    ) -> None:
        self._http = http
        self._table = table
        self._dispatcher = dispatcher
        self._exchanges = exchanges
        self._cluster_token = cluster_token
        self._on_retry = on_retry

    async def ask(
        self, request: AdmittedRequest, sender: Sender, capability: Capability | None
    ) -> WholeAnswer | RelayedStream:
        """The answer of one worker: a whole one, or a stream that has its first events and must be closed.

        Raises what the dispatcher raises where no worker can be chosen, and `UnavailableError` where all have failed.
        """
        asked = _Asked(request, sender, capability)
        answer = await self._ask_workers(asked, None)
        if isinstance(answer, RelayedStream):
            answer.resume_with(lambda tags, failure: self._resume(asked, tags, failure))
        return answer

    async def _resume(self, asked: _Asked, tags: bytes, failure: UnavailableError) -> RelayedStream:
        """The rest of a stream, from another worker of ours. Raises `failure` where there is none."""
        if failure.code == SHUTTING_DOWN:
            asked.num_counted = num_emitted_ids(tags)
        else:
            asked.num_lost += 1
        # A server of another kind does not know the resume form: it would begin the answer again.
        asked.tried |= {worker.worker_id for worker in self._table.workers() if worker.is_external}
        asked.request = replace(asked.request, body=resume_body(asked.request.body, tags), is_resume=True)
        answer = await self._ask_workers(asked, failure)
        if isinstance(answer, WholeAnswer):
            _log.error("worker refused to resume", request_id=asked.sender.request_id, status=answer.status)
            raise failure
        _log.info("stream resumed", request_id=asked.sender.request_id)
        return answer

    async def _ask_workers(self, asked: _Asked, failure: UnavailableError | None) -> WholeAnswer | RelayedStream:
        """The answer of the first worker that has one; `failure` is what an earlier worker failed with."""
        unknown: WholeAnswer | None = None  # of a worker that has the model no more, which the table has yet to tell
        while asked.num_lost < MAX_LOST_WORKERS:
            with ExitStack() as resources:
                try:
                    worker = resources.enter_context(
                        self._dispatcher.assign(
                            self._table.current(),
                            asked.request.model,
                            num_tokens=asked.request.num_tokens,
                            capability=asked.capability,
                            tried=asked.tried,
                        )
                    )
                except FastChatError as error:
                    if failure is None and unknown is not None:
                        return unknown
                    raise failure or self._table.explain(error) from None
                asked.tried.add(worker.worker_id)
                if failure is not None or unknown is not None:
                    self._on_retry()
                try:
                    answer = await self._ask_worker(worker, asked, resources)
                    if not (isinstance(answer, WholeAnswer) and answer.status == HTTPStatus.NOT_FOUND):
                        return answer
                    unknown = answer
                except UnavailableError as error:
                    failure = error
                    asked.num_lost += error.code in (LOST, BAD_ANSWER)
                    _log.warning(
                        "worker failed a request",
                        request_id=asked.sender.request_id,
                        worker_id=worker.worker_id,
                        code=error.code,
                        cause=repr(error.__cause__),
                    )
        assert failure is not None
        raise failure

    async def _ask_worker(
        self, worker: WorkerEntry, asked: _Asked, resources: ExitStack
    ) -> WholeAnswer | RelayedStream:
        exchange: Exchange = resources.enter_context(self._exchanges.open(worker))
        request, request_id = asked.request, asked.sender.request_id
        response = await exchange.start(self._http, request.path, self._headers(worker, asked), request.body)
        is_stream = response.content_type == "text/event-stream"
        if response.status == 200 and is_stream != request.is_stream:
            what = "a stream that nobody asked for" if is_stream else "no stream"
            raise bad_answer(worker, request_id, what)
        if response.status != 200 or not is_stream:
            return await read_whole_answer(exchange, response.status, response.headers, request_id)
        stream = RelayedStream(exchange, request_id, passed_headers(response.headers))
        await stream.wait_for_first_events()
        stream.own(resources.pop_all())
        return stream

    def _headers(self, worker: WorkerEntry, asked: _Asked) -> Mapping[str, str]:
        request, sender = asked.request, asked.sender
        headers = {"content-type": "application/json", "accept-encoding": "identity"}
        if worker.is_external:
            # Its keep-alive time is unknown: a reused connection might just be closing.
            return headers | {"connection": "close"}
        headers |= {
            "authorization": f"Bearer {self._cluster_token}",
            "user-agent": sender.user_agent,
            REQUEST_ID_HEADER: sender.request_id,
            CREATED_HEADER: str(asked.created),
            SEED_HEADER: str(asked.seed),
        }
        if sender.tenant:
            headers[TENANT_HEADER] = sender.tenant
        if request.is_stream:
            headers[TAGS_HEADER] = "1"
        if request.is_resume:
            headers[RESUME_HEADER] = "1"
        if asked.num_counted is not None:
            headers[COUNTED_HEADER] = str(asked.num_counted)
        return headers
