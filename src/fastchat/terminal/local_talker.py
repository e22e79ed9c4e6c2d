"""The model of this process: the API's own code over a loaded model, without a socket."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from fastchat.api.chat import prepare_chat
from fastchat.api.generation import RequestRecord
from fastchat.api.request_context import RequestContext
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.models.interface import ChatMessage
from fastchat.terminal.talker import Json, Question, Talker


class LocalTalker(Talker):
    """`load` starts the engine; it is called by `start` and raises what loading raises."""

    def __init__(self, load: Callable[[], Awaitable[ServedModel]]) -> None:
        self._load = load
        self._model: ServedModel | None = None

    async def start(self) -> None:
        model = await self._load()
        self.model_name = model.names[0]
        self.template_name = model.chat_format.name
        self.roles = model.chat_format.roles
        self._model = model

    async def close(self) -> None:
        if self._model is not None:
            await self._model.engine.close()

    async def prompt_of(self, question: Question) -> str:
        messages = [ChatMessage(message["role"], message["content"]) for message in question.messages()]
        token_ids = await asyncio.to_thread(self._started.chat_format.render, messages)
        return self._started.tokenizer.decode(token_ids, skip_special_tokens=False)

    @property
    def _started(self) -> ServedModel:
        assert self._model is not None, "start() comes first"
        return self._model

    @asynccontextmanager
    async def _open(self, body: Json) -> AsyncIterator[AsyncIterator[bytes]]:
        context = RequestContext(request_id=secrets.token_hex(8), created=int(time.time()))
        answer = await prepare_chat(ServedModels([self._started]), body, context, _ignore_record)
        async with answer.running(), aclosing(answer.events()) as events:
            yield events


def _ignore_record(_record: RequestRecord) -> None:
    """Nobody counts here what an answer cost."""
