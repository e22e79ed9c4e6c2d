"""The worker's HTTP routes: the same OpenAI routes as the API server's, over the models of this process."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from fastchat.api.answer import Answer
from fastchat.api.chat import prepare_chat
from fastchat.api.completions import prepare_completion
from fastchat.api.embeddings import prepare_embeddings
from fastchat.api.http_edge import EventStreamResponse, read_json_object, request_id_of, run_until_disconnect
from fastchat.api.model_cards import model_card, model_list
from fastchat.api.parameters import Ignored, validate
from fastchat.api.protocol import AdapterRequest
from fastchat.api.request_context import RequestContext
from fastchat.api.tokenization import detokenize, tokenize
from fastchat.cluster.contract import ADAPTERS, IGNORED_HEADER, MODEL_ACTIONS, MODEL_CONTROL_PATH, ModelAction
from fastchat.ops.metrics import METRICS_CONTENT_TYPE
from fastchat.worker.life_cycle import WorkerRuntime
from fastchat.worker.model_control import control_document

OPEN_PATHS = ("/livez", "/health")
_ADAPTERS_PATH = f"{MODEL_CONTROL_PATH}/{{base:path}}/{ADAPTERS}"


class AnswerStream(EventStreamResponse):
    """A stream whose sequences run exactly as long as it does."""

    def __init__(self, answer: Answer, headers: Mapping[str, str]) -> None:
        super().__init__(answer.events(), headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answer.running():
            await super().__call__(scope, receive, send)


class WorkerRoutes:
    """The handlers, over one runtime."""

    def __init__(self, runtime: WorkerRuntime) -> None:
        self._runtime = runtime

    def routes(self) -> list[Route]:
        """All of them; only `OPEN_PATHS` may be reached without the cluster token."""
        return [
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.model, methods=["GET"]),
            Route(MODEL_CONTROL_PATH, self.conditions, methods=["GET"]),
            *(
                Route(f"{MODEL_CONTROL_PATH}/{{name:path}}/{action}", self._acting(action), methods=["POST"])
                for action in MODEL_ACTIONS
            ),
            Route(_ADAPTERS_PATH, self.add_adapter, methods=["POST"]),
            Route(f"{_ADAPTERS_PATH}/{{name:path}}", self.remove_adapter, methods=["DELETE"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/livez", self.livez, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        self._runtime.check_accepting()
        document = await read_json_object(request)
        answer = await prepare_chat(self._runtime.models, document, _context(request), self._runtime.note_record)
        return await _respond(request, answer)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        self._runtime.check_accepting()
        document = await read_json_object(request)
        context = _context(request)
        answer = await prepare_completion(self._runtime.models, document, context, self._runtime.note_record)
        return await _respond(request, answer)

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings."""
        self._runtime.check_accepting()
        document = await read_json_object(request)
        context = _context(request)
        answer = await prepare_embeddings(self._runtime.models, document, context, self._runtime.note_record)
        return _json(await run_until_disconnect(request, answer.whole()), answer.ignored)

    async def models(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """GET /v1/models."""
        return _json(orjson.dumps(model_list((name, model.created) for name, model in self._runtime.models)))

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}; an id may hold slashes."""
        name = request.path_params["name"]
        return _json(orjson.dumps(model_card(name, self._runtime.models.find(name).created)))

    async def conditions(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """GET /api/v1/models."""
        control = self._runtime.control
        return _json(orjson.dumps(control_document(control.condition(), control.conditions())))

    def _acting(self, action: ModelAction) -> Callable[[Request], Awaitable[Response]]:
        """POST /api/v1/models/{id}/{action}."""

        async def act(request: Request) -> Response:
            self._runtime.check_accepting()
            control = self._runtime.control
            done = await run_until_disconnect(request, control.act(request.path_params["name"], action))
            return _json(orjson.dumps(control_document(control.condition(), [done])))

        return act

    async def add_adapter(self, request: Request) -> Response:
        """POST /api/v1/models/{base}/adapters. Carried out to its end, whether or not the client waits."""
        self._runtime.check_accepting()
        body = validate(AdapterRequest, await read_json_object(request))
        control = self._runtime.control
        done = await control.add_adapter(request.path_params["base"], body.name, body.path or body.name)
        return _json(orjson.dumps(control_document(control.condition(), [done])))

    async def remove_adapter(self, request: Request) -> Response:
        """DELETE /api/v1/models/{base}/adapters/{name}."""
        self._runtime.check_accepting()
        control = self._runtime.control
        done = await control.remove_adapter(request.path_params["base"], request.path_params["name"])
        return _json(orjson.dumps(control_document(control.condition(), [done])))

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        return _json(*await tokenize(self._runtime.models, await read_json_object(request)))

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        return _json(*await detokenize(self._runtime.models, await read_json_object(request)))

    async def metrics(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """GET /metrics."""
        return Response(self._runtime.render_metrics(), headers={"content-type": METRICS_CONTENT_TYPE})

    async def livez(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """GET /livez: the process answers; the controller compares the id with the one that registered."""
        return _json(orjson.dumps({"status": "alive", "worker_id": self._runtime.worker_id}))

    async def health(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """GET /health: 200 only while every engine lives and moves and requests are taken."""
        problem = self._runtime.problem()
        body = orjson.dumps({"status": problem or "ready", "worker_id": self._runtime.worker_id})
        return Response(body, 503 if problem else 200, media_type="application/json")


async def _respond(request: Request, answer: Answer) -> Response:
    if answer.is_stream:
        return AnswerStream(answer, _headers(answer.ignored))

    async def whole() -> bytes:
        async with answer.running():
            return await answer.whole()

    return _json(await run_until_disconnect(request, whole()), answer.ignored)


def _context(request: Request) -> RequestContext:
    return RequestContext.from_headers(request.headers, request_id=request_id_of(request.scope))


def _json(body: bytes, ignored: Ignored | None = None) -> Response:
    return Response(body, headers=_headers(ignored), media_type="application/json")


def _headers(ignored: Ignored | None) -> dict[str, str]:
    names = ignored.header_value() if ignored else None
    return {IGNORED_HEADER: names} if names else {}
