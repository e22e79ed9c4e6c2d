"""The models' life-cycle for operators: the states of all replicas, and load, unload, sleep, wake, pin, unpin.

GET  /api/v1/models                          every model of every worker, asked of the workers now
POST /api/v1/models/{model}/{action}         on each worker that serves the model, or on `?worker=ID` alone

Who may: with keys, those of `--api-keys` and those made with `fastchat keys create --operator`; without keys, programs
on this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response

from fastchat.api.answer_reader import error_of
from fastchat.api.http_edge import bearer_key, read_body, run_until_disconnect
from fastchat.cluster.contract import MODEL_ACTIONS, MODEL_CONTROL_PATH, ModelAction, WorkerEntry
from fastchat.cluster.dispatch import served_models
from fastchat.config import is_loopback
from fastchat.errors import (
    ConflictError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    RequestError,
    UnavailableError,
)
from fastchat.gateway.exchange import Exchanges
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.mounted import Endpoint
from fastchat.gateway.openapi import Operation
from fastchat.ops.keys import ApiKeys

ASK_LIMIT_S = 3.0
"""How long a worker may take to tell its models' states."""

_log = structlog.stdlib.get_logger(__name__)

Json = dict[str, Any]  # Any: JSON has any value


@dataclass(slots=True)
class WorkerLine:
    """How workers are reached; set by the app's lifespan before the first request."""

    session: aiohttp.ClientSession
    exchanges: Exchanges
    cluster_token: str


class ModelControl:
    """The endpoints and what they share."""

    line: WorkerLine

    def __init__(self, table: LiveTable, keys: ApiKeys) -> None:
        self._table = table
        self._keys = keys

    def routes(self) -> list[tuple[Operation, Endpoint]]:
        """Each operation with its endpoint."""
        listing = Operation("GET", MODEL_CONTROL_PATH, "State, memory and last use of every model, for operators")
        return [(listing, self._list), *(self._acting(action) for action in MODEL_ACTIONS)]

    def _acting(self, action: ModelAction) -> tuple[Operation, Endpoint]:
        async def act(request: Request) -> Response:
            return await self._act(request, action)

        path = f"{MODEL_CONTROL_PATH}/{{model:path}}/{action}"
        return Operation("POST", path, _SUMMARIES[action], query=("worker",)), act

    async def _list(self, request: Request) -> Response:
        self._check_operator(request)
        workers = self._table.current().workers
        documents = await asyncio.gather(*(self._document_of(worker) for worker in workers))
        return _json(_merged(documents))

    async def _act(self, request: Request, action: ModelAction) -> Response:
        self._check_operator(request)
        await check_no_fields(request)
        model = request.path_params["model"]
        workers = self._chosen_workers(model, request.query_params.get("worker"))
        tenant = self._keys.tenant_of(bearer_key(request.scope) or "")
        _log.info("model control", model=model, action=action, tenant=tenant, num_workers=len(workers))
        path = f"{MODEL_CONTROL_PATH}/{quote(model)}/{action}"
        told = asyncio.gather(*(self._tell(worker, path) for worker in workers))
        return _json(_merged(await run_until_disconnect(request, told)))

    def _check_operator(self, request: Request) -> None:
        """Raise `PermissionDeniedError` for who may use the models but not move them."""
        if not self._keys.is_open:
            if not self._keys.is_operator(bearer_key(request.scope) or ""):
                raise PermissionDeniedError(
                    "This key is no operator's; make one with `fastchat keys create --operator`.",
                    code="operator_key_needed",
                )
        elif not _is_local(request):
            raise PermissionDeniedError(
                "Without keys only programs on the server's own machine may do this; make an operator's key with "
                "`fastchat keys create --operator`.",
                code="operator_key_needed",
            )

    def _chosen_workers(self, model: str, worker_id: str | None) -> list[WorkerEntry]:
        snapshot = self._table.current()
        serving = [worker for worker in snapshot.workers if any(entry.name == model for entry in worker.models)]
        if not serving:
            raise self._table.explain(ModelNotFoundError(model, served_models(snapshot)))
        chosen = [worker for worker in serving if worker_id in (None, worker.worker_id)]
        if not chosen:
            raise InvalidRequestError(
                f"No worker {worker_id} serves `{model}`; GET {MODEL_CONTROL_PATH} names them.", param="worker"
            )
        own = [worker for worker in chosen if not worker.is_external]
        if not own:
            raise InvalidRequestError(f"`{model}` is on a server that loads its models itself.", param="model")
        return own

    async def _document_of(self, worker: WorkerEntry) -> Json:
        """What a worker says of its models; what the table knows of one that says nothing."""
        if not worker.is_external:
            try:
                async with self.line.session.get(
                    worker.address + MODEL_CONTROL_PATH,
                    headers=self._headers(),
                    timeout=aiohttp.ClientTimeout(total=ASK_LIMIT_S),
                    allow_redirects=False,
                ) as response:
                    if response.status == 200:
                        return _control_document(await response.read())
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                _log.warning("worker does not tell its models", worker_id=worker.worker_id, cause=repr(error))
        state = "external" if worker.is_external else "unreachable"
        rows = [
            {"id": entry.name, "aliases": [], "worker": worker.worker_id, "state": state}
            for entry in worker.models
            if not entry.alias_of
        ]
        return {"data": rows, "workers": [{"id": worker.worker_id, "address": worker.address}]}

    async def _tell(self, worker: WorkerEntry, path: str) -> Json:
        """Tell one worker; loading may take minutes. Raises what it answers, `UnavailableError` where it is lost."""
        with self.line.exchanges.open(worker) as exchange:
            response = await exchange.start(self.line.session, path, self._headers(), b"")
            body = b""
            while chunk := await exchange.read():
                body += chunk
        try:
            if response.status == 200:
                return _control_document(body)
            error = error_of(orjson.loads(body), status=response.status)
        except ValueError:
            error = None
        if isinstance(error, RequestError) and response.status == 409:
            raise ConflictError(error.message, code=error.code)
        raise error or UnavailableError(f"The worker {worker.worker_id} answers {response.status}; look at its log.")

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.line.cluster_token}", "accept-encoding": "identity"}


async def check_no_fields(request: Request) -> None:
    """Raise `InvalidRequestError` where a body says something that nobody would obey."""
    body = await read_body(request) if request.headers.get("content-length", "0") != "0" else b""
    if body.strip() not in (b"", b"{}"):
        raise InvalidRequestError("This route takes no body; the URL says everything.", code="unexpected_body")


_SUMMARIES: dict[ModelAction, str] = {
    "load": "Bring a model into memory, and wait until it is there",
    "unload": "Free a model's memory as soon as nobody uses it; the next request loads it again",
    "sleep": "The same as unload: what sleeps is dropped, and mapped from disk again",
    "wake": "The same as load",
    "pin": "Bring a model into memory and keep it there",
    "unpin": "Let a model leave memory again when that is wanted",
}


def _is_local(request: Request) -> bool:
    """Whether a program of this machine asks, and not a proxy on it for somebody else."""
    is_relayed = any(name in request.headers for name in ("forwarded", "x-forwarded-for", "x-real-ip", "via"))
    return request.client is not None and is_loopback(request.client.host) and not is_relayed


def _control_document(body: bytes) -> Json:
    document = orjson.loads(body)
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in ("data", "workers")):
        raise ValueError("no list of models")
    return document


def _merged(documents: Sequence[Json]) -> Json:
    rows = [row for document in documents for row in document["data"]]
    rows.sort(key=lambda row: (row["id"], row["worker"]))
    return {"object": "list", "data": rows, "workers": [each for document in documents for each in document["workers"]]}


def _json(document: Json) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
