"""The API server's routes: OpenAI's, relayed to workers, and what operators ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import orjson
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fastchat import __version__
from fastchat.api.http_edge import EventStreamResponse, bearer_key, request_id_of, run_until_disconnect
from fastchat.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    TokenizeRequest,
)
from fastchat.cluster.dispatch import Capability, Dispatcher
from fastchat.errors import FastChatError, UnavailableError
from fastchat.gateway.admission import admit
from fastchat.gateway.answers import WholeAnswer
from fastchat.gateway.live_table import LiveTable
from fastchat.gateway.model_control import ModelControl
from fastchat.gateway.model_list import model_card, model_list
from fastchat.gateway.mounted import Endpoint, MountedRoutes
from fastchat.gateway.observed_request import ObservedRequest
from fastchat.gateway.openapi import Operation, openapi_document
from fastchat.gateway.relay import Relay, Sender
from fastchat.ops.keys import ApiKeys
from fastchat.ops.metrics import METRICS_CONTENT_TYPE, GatewayMetrics

OPEN_PATHS = frozenset({"/livez", "/health"})
"""Reached without a key: what a supervisor asks before it has any."""


@dataclass(frozen=True, slots=True)
class RelayedRoute:
    """A route that a worker answers at `worker_path`."""

    path: str
    worker_path: str
    capability: Capability | None
    summary: str
    body: type[BaseModel]

    @property
    def may_omit_model(self) -> bool:
        """Whether the only served model is meant where none is named."""
        return self.capability is None


RELAYED_ROUTES = tuple(
    RelayedRoute(*row)
    for row in (
        ("/v1/chat/completions", "/v1/chat/completions", "chat", "Answer a conversation", ChatCompletionRequest),
        ("/v1/completions", "/v1/completions", "completions", "Continue a text", CompletionRequest),
        ("/v1/embeddings", "/v1/embeddings", "embeddings", "Turn texts into vectors", EmbeddingRequest),
        ("/tokenize", "/tokenize", None, "Token ids of a text or conversation", TokenizeRequest),
        ("/detokenize", "/detokenize", None, "Text of token ids", DetokenizeRequest),
        # openai 0.28 with `engine=`
        ("/v1/engines/{model:path}/completions", "/v1/completions", "completions", "The same", CompletionRequest),
        ("/v1/engines/{model:path}/embeddings", "/v1/embeddings", "embeddings", "The same", EmbeddingRequest),
    )
)

_ASKED_ROUTES = (
    Operation("GET", "/v1/models", "List the served models"),
    Operation("GET", "/v1/models/{model:path}", "One served model"),
    Operation("GET", "/livez", "200 while the process is up", is_open=True),
    Operation("GET", "/health", "200 while at least one worker can answer", is_open=True),
    Operation("GET", "/metrics", "Prometheus metrics"),
    Operation("GET", "/version", "The version of this server"),
    Operation("GET", "/openapi.json", "This document"),
)


class ApiRoutes:
    """The endpoints and what they share. `relay` is set by the app's lifespan, before the first request."""

    relay: Relay

    def __init__(
        self, *, table: LiveTable, dispatcher: Dispatcher, keys: ApiKeys, mounted: Sequence[MountedRoutes] = ()
    ) -> None:
        self._table = table
        self._dispatcher = dispatcher
        self._keys = keys
        self.control = ModelControl(table, keys)
        self._mounted = (*self.control.routes(), *(route for part in mounted for route in part.routes))
        self.metrics = GatewayMetrics(route.path for route in RELAYED_ROUTES)
        self._openapi: dict[bool, bytes] = {}

    def build(self) -> list[Route]:
        """All routes of the app, the busiest first."""
        endpoints: dict[str, Endpoint] = {
            "/v1/models": self._list_models,
            "/v1/models/{model:path}": self._get_model,
            "/livez": self._livez,
            "/health": self._health,
            "/metrics": self._show_metrics,
            "/version": self._version,
            "/openapi.json": self._show_openapi,
        }
        relayed = [Route(route.path, self._relaying(route), methods=["POST"]) for route in RELAYED_ROUTES]
        asked = [Route(each.path, endpoints[each.path], methods=[each.method]) for each in _ASKED_ROUTES]
        others = [Route(each.path, endpoint, methods=[each.method]) for each, endpoint in self._mounted]
        return relayed + asked + others

    def _relaying(self, route: RelayedRoute) -> Endpoint:
        """The endpoint of a route that workers answer."""

        async def relayed(request: Request) -> Response:
            observed = ObservedRequest(route.path, self.metrics, self._table)
            try:
                return await self._relay(request, route, observed)
            except BaseException as error:
                observed.fail(error)
                raise

        return relayed

    async def _relay(self, request: Request, route: RelayedRoute, observed: ObservedRequest) -> Response:
        admitted = await admit(
            request, route.worker_path, default_model=self._only_model() if route.may_omit_model else None
        )
        observed.model = admitted.model
        sender = Sender(
            request_id=request_id_of(request.scope),
            tenant=self._keys.tenant_of(bearer_key(request.scope) or ""),
            user_agent=request.headers.get("user-agent", "")[:256],
        )
        answer = await run_until_disconnect(request, self.relay.ask(admitted, sender, route.capability))
        if isinstance(answer, WholeAnswer):
            observed.finish(answer.status)
            return Response(answer.body, answer.status, answer.headers, media_type="application/json")
        observed.note_first_byte()
        answer.on_close(lambda: observed.finish(200))
        return EventStreamResponse(answer, answer.headers)

    def _only_model(self) -> str | None:
        served = self._table.served()
        return served[0] if len(served) == 1 else None

    async def _list_models(self, _request: Request) -> Response:
        return _json(model_list(self._table.current()))

    async def _get_model(self, request: Request) -> Response:
        try:
            return _json(model_card(self._table.current(), request.path_params["model"]))
        except FastChatError as error:
            raise self._table.explain(error) from None

    async def _livez(self, _request: Request) -> Response:
        return _json({"status": "alive"})

    async def _health(self, _request: Request) -> Response:
        states = [worker.state for worker in self._table.current().workers]
        if "ready" in states:
            return _json({"status": "ready", "num_workers": states.count("ready")})
        present = f"{len(states)} registered and none of them ready" if states else "none has registered"
        raise UnavailableError(f"No worker can answer: {present}.", code="no_worker")

    async def _show_metrics(self, _request: Request) -> Response:
        states = [worker.state for worker in self._table.workers()]
        self.metrics.set_condition(
            num_in_flight=self._dispatcher.num_in_flight,
            num_ready=states.count("ready"),
            num_draining=states.count("draining"),
            num_hung=states.count("hung"),
        )
        return Response(self.metrics.render(), media_type=METRICS_CONTENT_TYPE)

    async def _version(self, _request: Request) -> Response:
        return _json({"version": __version__})

    async def _show_openapi(self, _request: Request) -> Response:
        needs_key = not self._keys.is_open
        if needs_key not in self._openapi:
            relayed = (
                Operation("POST", route.path, route.summary, route.body, can_stream=issubclass(route.body, _STREAMED))
                for route in RELAYED_ROUTES
            )
            operations = (*relayed, *_ASKED_ROUTES, *(operation for operation, _ in self._mounted))
            self._openapi[needs_key] = orjson.dumps(openapi_document(operations, needs_key=needs_key))
        return Response(self._openapi[needs_key], media_type="application/json")


_STREAMED = (ChatCompletionRequest, CompletionRequest)


def _json(document: object) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
