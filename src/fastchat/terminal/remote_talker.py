"""A running server, ours or any OpenAI-compatible one, over HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from urllib.parse import urlsplit

import aiohttp

from fastchat.config import dial_url, parse_url
from fastchat.errors import (
    AuthenticationError,
    FastChatError,
    RequestError,
    UnavailableError,
)
from fastchat.terminal.answer_reader import error_of
from fastchat.terminal.talker import Json, Question, Talker

DEFAULT_ROLES = ("user", "assistant")
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=600.0)
"""A long prompt may take minutes before its first word; a person is there to press Ctrl-C."""
_MAX_ERROR_BYTES = 2**20


class RemoteTalker(Talker):
    """Talks to a model of `base_url` (with its `/v1`), whose prompt format and labels stay on the server."""

    roles = DEFAULT_ROLES

    def __init__(self, base_url: str, *, api_key: str | None, model_name: str) -> None:
        self.model_name = model_name
        self.template_name = model_name
        self._base_url = base_url
        self._dial_url = dial_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        # A connection that waited while a person typed may be closed by now; a new one costs a millisecond.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), timeout=_TIMEOUT, headers=self._headers
        )

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def prompt_of(self, question: Question) -> str:
        return json.dumps(question.messages(), ensure_ascii=False)

    async def list_models(self) -> list[str]:
        """The names that the server serves."""
        with self._translated():
            async with self._opened.get(f"{self._dial_url}/models") as response:
                if response.status != 200:
                    raise await self._refusal(response)
                raw = await response.read()
        try:
            cards = json.loads(raw)["data"]
            return [str(card["id"]) for card in cards]
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(
                f"{self._base_url}/models is not a list of models; is this an OpenAI-compatible server?"
            ) from None

    @property
    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "start() comes first"
        return self._session

    @asynccontextmanager
    async def _open(self, body: Json) -> AsyncIterator[AsyncIterator[bytes]]:
        with self._translated():
            response = await self._opened.post(f"{self._dial_url}/chat/completions", json=body)
        try:
            if response.status != 200:
                raise await self._refusal(response)
            async with aclosing(self._received(response)) as received:
                yield received
        finally:
            response.close()  # the server aborts an answer that nobody reads

    async def _received(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        while True:
            with self._translated():
                received = await response.content.readany()
            if not received:
                return
            yield received

    async def _refusal(self, response: aiohttp.ClientResponse) -> FastChatError:
        """What the server said, as one of our errors."""
        with self._translated():
            raw = await response.content.read(_MAX_ERROR_BYTES)
        try:
            error = error_of(json.loads(raw), status=response.status)
        except ValueError:
            error = None
        reason = error.message if error is not None else f"{response.status} {response.reason}"
        if response.status == 401:
            return AuthenticationError(f"{reason} (give a key with --api-key or OPENAI_API_KEY)")
        if error is not None:
            return error
        if 400 <= response.status < 500:
            return RequestError(f"{response.url} answers {reason}; is --url right?")
        return UnavailableError(f"{self._base_url} answers {reason}.")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The HTTP client's errors as ours, each one line."""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise UnavailableError(
                f"{self._base_url} does not answer ({_system_reason(error.os_error)}); "
                "start a server with `fastchat serve`, or give its address with --url."
            ) from error
        except TimeoutError as error:
            raise UnavailableError(f"{self._base_url} does not answer within the time limit.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"The connection to {self._base_url} was lost ({_reason(error)}).") from error


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


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _system_reason(error: OSError) -> str:
    """`Connection refused` where the system gave a number, which asyncio words in its own way."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else _reason(error)
