"""A running server, ours or any OpenAI-compatible one, over HTTP."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from urllib.parse import urlsplit

from fastchat.config import parse_url
from fastchat.errors import UnavailableError
from fastchat.terminal.http_connection import HttpConnection
from fastchat.terminal.talker import Json, Question, Talker

DEFAULT_ROLES = ("user", "assistant")


class RemoteTalker(Talker):
    """Talks to a model of `base_url` (with its `/v1`), whose prompt format and labels stay on the server."""

    roles = DEFAULT_ROLES

    def __init__(self, base_url: str, *, api_key: str | None, model_name: str) -> None:
        self.model_name = model_name
        self.template_name = model_name
        self._connection = HttpConnection(base_url, api_key=api_key)

    async def start(self) -> None:
        await self._connection.open()

    async def close(self) -> None:
        await self._connection.close()

    async def prompt_of(self, question: Question) -> str:
        return json.dumps(question.messages(), ensure_ascii=False)

    async def list_models(self) -> list[str]:
        """The names that the server serves."""
        document = await self._connection.get("/models", what="a list of models")
        try:
            return [str(card["id"]) for card in document["data"]]
        except (KeyError, TypeError):
            raise UnavailableError(
                f"{self._connection.base_url}/models is not a list of models; is this an OpenAI-compatible server?"
            ) from None

    def _open(self, body: Json) -> AbstractAsyncContextManager[AsyncIterator[bytes]]:
        return self._connection.stream("/chat/completions", body)


def base_url_of(text: str) -> str:
    """`http://host:8000` and `http://host:8000/v1` as the URL that ends before `/models`. Raises `ConfigError`."""
    url = parse_url(text)
    if urlsplit(url).path:
        return url
    return f"{url}/v1"


async def list_models(base_url: str, *, api_key: str | None) -> list[str]:
    """The names that a server serves. Raises `UnavailableError` or what the server answers."""
    talker = RemoteTalker(base_url, api_key=api_key, model_name="")
    await talker.start()
    try:
        return await talker.list_models()
    finally:
        await talker.close()
