"""FastChat's own endpoints of the controller, with its exact shapes, over our table.

What is different on purpose: a missing field is a 400 and not a 500, everything needs the cluster token, and the
controller asks no address what it serves: who registers a server says so in `worker_status`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import aiohttp
import structlog
from fastapi import APIRouter, Request

from fastchat.api.http_edge import read_json_object
from fastchat.cluster.address_check import is_listening
from fastchat.cluster.dial_rules import DialRules
from fastchat.cluster.dispatch import Dispatcher, served_models
from fastchat.cluster.table import WorkerTable
from fastchat.config import parse_url
from fastchat.errors import ConfigError, InvalidRequestError, ModelNotFoundError, UnavailableError

MAX_MODEL_NAMES = 100
MAX_NAME_CHARACTERS = 256

_log = structlog.stdlib.get_logger(__name__)
Body = dict[str, Any]  # Any: JSON
_Value = TypeVar("_Value", str, int, bool)
_TYPE_NAMES: dict[type, str] = {str: "string", int: "integer", bool: "boolean"}


class LegacyEndpoints:
    """The handlers, bound to one table. `get_session` gives the controller's HTTP client, which opens later."""

    def __init__(self, table: WorkerTable, rules: DialRules, get_session: Callable[[], aiohttp.ClientSession]) -> None:
        self._table = table
        self._rules = rules
        self._get_session = get_session
        self._dispatcher = Dispatcher()

    async def register_worker(self, request: Request) -> None:
        """Register an OpenAI-compatible server by URL. With `check_heart_beat` it expires 90 s after the last beat."""
        body = await read_json_object(request)
        address = _server_address(body)
        expects_heart_beats = _field(body, "check_heart_beat", bool)
        if body.get("multimodal", False) is not False:
            raise InvalidRequestError("multimodal must be false: images are not relayed here.", param="multimodal")
        names, queue_length = _worker_status(body)
        await self._rules.check(address)
        self._table.register_external(
            address,
            names,
            created=int(time.time()),
            queue_length=queue_length,
            expects_heart_beats=expects_heart_beats,
        )
        _log.info("server registered", address=address, models=",".join(names), expects_heart_beats=expects_heart_beats)

    async def refresh_all_workers(self) -> None:
        """Drop the servers registered by URL that no longer answer. Workers of ours are known by their connection."""
        addresses = [worker.address for worker in self._table.snapshot().workers if worker.is_external]
        answers = await asyncio.gather(*(is_listening(self._get_session(), address) for address in addresses))
        for address, is_there in zip(addresses, answers, strict=True):
            registration = None if is_there else self._table.find_external(address)
            if registration is not None:
                self._table.remove(registration)
                _log.info("server dropped", address=address, reason="it does not answer")

    async def list_models(self) -> Body:
        """The names of all models."""
        return {"models": served_models(self._table.snapshot())}

    async def list_multimodal_models(self) -> Body:
        """None: images are not relayed."""
        return {"models": []}

    async def get_worker_address(self, request: Request) -> Body:
        """The address of a worker of `model`, "" where there is none."""
        model = _field(await read_json_object(request), "model", str)
        try:
            worker = self._dispatcher.choose(self._table.snapshot(), model)
        except (ModelNotFoundError, UnavailableError):
            return {"address": ""}
        return {"address": worker.address}

    async def receive_heart_beat(self, request: Request) -> Body:
        """Renew a server registered by URL; false tells it to register again."""
        body = await read_json_object(request)
        return {"exist": self._table.heart_beat(_server_address(body), _field(body, "queue_length", int))}

    async def worker_get_status(self) -> Body:
        """The cluster as if it were one worker."""
        workers = self._table.snapshot().workers
        queue_length = sum(worker.load.num_running + worker.load.num_waiting for worker in workers)
        return {
            "model_names": served_models(self._table.snapshot()),
            "speed": len(workers),
            "queue_length": queue_length,
        }

    async def test_connection(self) -> str:
        """FastChat's sign of life."""
        return "success"


def legacy_router(endpoints: LegacyEndpoints) -> APIRouter:
    """The routes of FastChat's controller."""
    router = APIRouter()
    for path, handler in (
        ("/register_worker", endpoints.register_worker),
        ("/refresh_all_workers", endpoints.refresh_all_workers),
        ("/list_models", endpoints.list_models),
        ("/list_language_models", endpoints.list_models),
        ("/list_multimodal_models", endpoints.list_multimodal_models),
        ("/get_worker_address", endpoints.get_worker_address),
        ("/receive_heart_beat", endpoints.receive_heart_beat),
        ("/worker_get_status", endpoints.worker_get_status),
    ):
        router.add_api_route(path, handler, methods=["POST"])
    router.add_api_route("/test_connection", endpoints.test_connection, methods=["GET"])
    return router


def _server_address(body: Body) -> str:
    """`worker_name` as the URL that paths are put behind; a `/v1` at its end is dropped."""
    try:
        return parse_url(_field(body, "worker_name", str)).removesuffix("/v1")
    except ConfigError as error:
        raise InvalidRequestError(f"worker_name: {error.message}", param="worker_name") from error


def _worker_status(body: Body) -> tuple[tuple[str, ...], int]:
    """The model names and the queue length that a registration gives."""
    status = body.get("worker_status")
    if status is None:
        raise InvalidRequestError(
            "worker_status is missing: the controller asks no address what it serves. "
            'Send {"worker_status": {"model_names": ["NAME"], "speed": 1, "queue_length": 0}}.',
            param="worker_status",
        )
    if not isinstance(status, dict):
        raise InvalidRequestError("worker_status must be an object.", param="worker_status")
    if status.get("speed", 1) != 1:
        raise InvalidRequestError(
            "worker_status.speed must be 1: requests go to the worker with the fewest outstanding tokens.",
            param="worker_status",
        )
    names = status.get("model_names")
    if not isinstance(names, list) or not 0 < len(names) <= MAX_MODEL_NAMES or not all(map(_is_model_name, names)):
        raise InvalidRequestError("worker_status.model_names must list the models' names.", param="worker_status")
    queue_length = status.get("queue_length", 0)
    if type(queue_length) is not int or not 0 <= queue_length < 2**31:
        raise InvalidRequestError("worker_status.queue_length must be a whole number.", param="worker_status")
    return tuple(dict.fromkeys(names)), queue_length


def _is_model_name(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARACTERS and name.isprintable()


def _field(body: Body, name: str, kind: type[_Value]) -> _Value:
    """A field that must be there, of exactly this type."""
    if name not in body:
        raise InvalidRequestError(f"{name} is missing.", param=name, code="missing_field")
    value = body[name]
    if type(value) is not kind:
        raise InvalidRequestError(f"{name} must be of type {_TYPE_NAMES[kind]}.", param=name)
    return value
