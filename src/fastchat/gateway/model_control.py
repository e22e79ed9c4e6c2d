"""The models' life-cycle for operators: the states of all replicas, moving models, adding and removing adapters.

GET    /api/v1/models                          every model of every worker, asked of the workers now
POST   /api/v1/models/{model}/{action}         on each worker that serves the model, or on `?worker=ID` alone
POST   /api/v1/models/{base}/adapters          an adapter more, on each worker that serves its base
DELETE /api/v1/models/{base}/adapters/{name}   that adapter no more

Who may: with keys, those of `--api-keys` and those made with `fastchat keys create --operator`; without keys, programs
on this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import quote

import orjson
import structlog
from starlette.requests import Request
from starlette.responses import Response

from fastchat.api.answer_reader import error_of
from fastchat.api.http_edge import bearer_key, read_body, read_json_object, run_until_disconnect
from fastchat.api.parameters import validate
from fastchat.api.protocol import AdapterRequest
from fastchat.cluster.contract import ADAPTERS, MODEL_ACTIONS, MODEL_CONTROL_PATH, ModelAction, WorkerEntry
from fastchat.cluster.dispatch import served_models
from fastchat.config import is_loopback
from fastchat.errors import (
    ConflictError,
    FastChatError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    RecordNotFoundError,
    RequestError,
    UnavailableError,
)
from fastchat.gateway.exchange import Exchanges
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.mounted import Endpoint
from fastchat.gateway.openapi import Operation
from fastchat.gateway.worker_http import WorkerHttp
from fastchat.ops.keys import ApiKeys

ASK_LIMIT_S = 3.0
"""How long a worker may take to tell its models' states."""

_log = structlog.stdlib.get_logger(__name__)

Json = dict[str, Any]  # Any: JSON has any value


@dataclass(slots=True)
class WorkerLine:
    """How workers are reached; set by the app's lifespan before the first request."""

    http: WorkerHttp
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
        path = f"{MODEL_CONTROL_PATH}/{{base:path}}/{ADAPTERS}"
        adding = Operation("POST", path, "Serve an adapter beside its base", AdapterRequest, query=("worker",))
        removing = Operation("DELETE", f"{path}/{{name:path}}", "Serve an adapter no more", query=("worker",))
        return [
            (listing, self._list),
            *(self._acting(action) for action in MODEL_ACTIONS),
            (adding, self._add_adapter),
            (removing, self._remove_adapter),
        ]

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
        workers = self._chosen_workers([model], request)
        self._note(request, action, workers, model=model)
        return await self._tell_all(request, workers, _Order(f"{quote(model)}/{action}"))

    async def _add_adapter(self, request: Request) -> Response:
        self._check_operator(request)
        body = validate(AdapterRequest, await read_json_object(request))
        base = request.path_params["base"]
        workers = self._chosen_workers([base], request)
        self._note(request, "add adapter", workers, model=base, adapter=body.name)
        order = _Order(f"{quote(base)}/{ADAPTERS}", body.model_dump_json(exclude_none=True).encode())
        return await self._tell_all(request, workers, order)

    async def _remove_adapter(self, request: Request) -> Response:
        self._check_operator(request)
        await check_no_fields(request)
        base, name = request.path_params["base"], request.path_params["name"]
        workers = self._chosen_workers([base, name], request)
        self._note(request, "remove adapter", workers, model=base, adapter=name)
        order = _Order(f"{quote(base)}/{ADAPTERS}/{quote(name)}", method="DELETE")
        return await self._tell_all(request, workers, order)

    def _note(self, request: Request, action: str, workers: Sequence[WorkerEntry], **facts: str) -> None:
        tenant = self._keys.tenant_of(bearer_key(request.scope) or "")
        _log.info("model control", action=action, tenant=tenant, num_workers=len(workers), **facts)

    async def _tell_all(self, request: Request, workers: Sequence[WorkerEntry], order: _Order) -> Response:
        """All at once and each to its end, whichever of them fail."""
        told = asyncio.gather(*(self._tell(worker, order) for worker in workers), return_exceptions=True)
        outcomes = await run_until_disconnect(request, told)
        both = zip(workers, outcomes, strict=True)
        failures = [(worker, outcome) for worker, outcome in both if isinstance(outcome, BaseException)]
        if failures:
            raise _told_of_all(failures, num_workers=len(workers))
        return _json(_merged([each for each in outcomes if isinstance(each, dict)]))

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

    def _chosen_workers(self, names: Sequence[str], request: Request) -> list[WorkerEntry]:
        """The workers that serve all of the names, or the one of them that `?worker=ID` means."""
        snapshot = self._table.current()
        serving = list(snapshot.workers)
        for model in names:
            serving = [worker for worker in serving if any(entry.name == model for entry in worker.models)]
            if not serving:
                error = ModelNotFoundError(model, served_models(snapshot))
                raise self._table.explain(error) if model == names[0] else error
        worker_id = request.query_params.get("worker")
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
                async with asyncio.timeout(ASK_LIMIT_S):
                    return await self._asked_document(worker)
            except (OSError, ValueError) as error:  # a TimeoutError is an OSError
                _log.warning("worker does not tell its models", worker_id=worker.worker_id, cause=repr(error))
        state = "external" if worker.is_external else "unreachable"
        rows = [
            {"id": entry.name, "aliases": [], "worker": worker.worker_id, "state": state}
            for entry in worker.models
            if not entry.alias_of
        ]
        return {"data": rows, "workers": [{"id": worker.worker_id, "address": worker.address}]}

    async def _asked_document(self, worker: WorkerEntry) -> Json:
        answer = await self.line.http.ask(worker.address, MODEL_CONTROL_PATH, self._headers(), method="GET")
        try:
            body = b""
            while chunk := await answer.read():
                body += chunk
        finally:
            answer.close()
        return _control_document(body)

    async def _tell(self, worker: WorkerEntry, order: _Order) -> Json:
        """Tell one worker; loading may take minutes. Raises what it answers, `UnavailableError` where it is lost."""
        with self.line.exchanges.open(worker) as exchange:
            path = f"{MODEL_CONTROL_PATH}/{order.path}"
            response = await exchange.start(self.line.http, path, self._headers(), order.body, method=order.method)
            body = b""
            while chunk := await exchange.read():
                body += chunk
        try:
            if response.status == 200:
                return _control_document(body)
            error = error_of(orjson.loads(body), status=response.status)
        except ValueError:
            error = None
        if isinstance(error, RequestError):
            raise _KINDS.get(response.status, InvalidRequestError)(error.message, param=error.param, code=error.code)
        raise error or UnavailableError(f"The worker {worker.worker_id} answers {response.status}; look at its log.")

    def _headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.line.cluster_token}", "accept-encoding": "identity"}


_KINDS: dict[int, type[RequestError]] = {403: PermissionDeniedError, 404: RecordNotFoundError, 409: ConflictError}
"""What a worker says no with, by its status."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What workers are told: a path below the control path, as it stands in a URL."""

    path: str
    body: bytes = b""
    method: Literal["POST", "DELETE"] = "POST"


def _told_of_all(failures: Sequence[tuple[WorkerEntry, BaseException]], *, num_workers: int) -> BaseException:
    """The first failure; where there are several workers its message says which of them failed and how."""
    error = failures[0][1]
    if isinstance(error, FastChatError) and num_workers > 1:
        reasons = (f"worker {worker.worker_id}: {getattr(each, 'message', each)}" for worker, each in failures)
        error.message = f"It failed on {len(failures)} of {num_workers} workers. {' '.join(reasons)}"
    return error


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
