"""An app with our HTTP edge, and endpoints that fail, stream and wait in every way."""

import asyncio
import time

from fastapi import APIRouter, FastAPI, Request, WebSocket
from pydantic import BaseModel

from fastchat.api.http_edge import (
    BearerGuard,
    EventStreamResponse,
    install_error_handlers,
    read_json_object,
    run_until_disconnect,
)
from fastchat.api.json_body import BodyLimits
from fastchat.errors import EngineError, InvalidRequestError, UnavailableError

MAX_BYTES = 1000
DEADLINE_S = 1.0


class Item(BaseModel):
    size: int


class Witness:
    """What the app's endpoints saw; events are waited for by the tests."""

    def __init__(self):
        self.closed = asyncio.Event()
        self.closed_at = 0.0
        self.work_began = asyncio.Event()
        self.num_yielded = 0

    def note_closed(self):
        self.closed_at = time.monotonic()
        self.closed.set()


routes = APIRouter()


@routes.get("/bug")
async def bug():
    raise ValueError("the secret of /usr/lib")


@routes.get("/engine")
async def engine():
    raise EngineError("logits of layer 3 were NaN")


@routes.post("/item")
async def take_item(item: Item):
    return item


@routes.post("/json")
async def read(request: Request):
    return await read_json_object(request, BodyLimits(max_bytes=MAX_BYTES, deadline_s=DEADLINE_S))


@routes.get("/work")
async def work(request: Request):
    witness = request.app.state.witness

    async def wait():
        witness.work_began.set()
        try:
            await asyncio.Event().wait()
        finally:
            witness.note_closed()

    await run_until_disconnect(request, wait())


@routes.get("/answer")
async def answer(request: Request):
    async def give():
        return {"answer": 42}

    return await run_until_disconnect(request, give())


@routes.get("/stream/{kind}")
async def stream(kind: str, request: Request):
    return EventStreamResponse(events(kind, request.app.state.witness), {"x-more": "1"})


@routes.websocket("/socket")
async def open_socket(socket: WebSocket):
    await socket.accept()


def is_allowed(key):
    if key == "explode":
        raise RuntimeError("the key store is gone")
    return key == "good"


def create_app(witness):
    app = FastAPI(openapi_url=None)
    app.state.witness = witness
    app.include_router(routes)
    app.add_middleware(BearerGuard, is_allowed=is_allowed, open_paths=("/livez",))
    install_error_handlers(app, request_id_header="x-fastchat-request-id")
    return app


async def events(kind, witness):
    try:
        if kind == "refused":
            raise InvalidRequestError("no", param="top_p")
        for number in range(3 if kind != "endless" else 10**9):
            yield b"data: %d\n\n" % number
            witness.num_yielded += 1
            await asyncio.sleep(0.01 if kind == "endless" else 0)
        if kind == "lost":
            raise UnavailableError("The worker was lost.", code="worker_lost")
        if kind == "bug":
            raise ValueError("the secret of /usr/lib")
        yield b"data: [DONE]\n\n"
    finally:
        witness.note_closed()
