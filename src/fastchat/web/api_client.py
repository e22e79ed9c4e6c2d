"""The page's one way to the models: an HTTP client of the API server."""

from __future__ import annotations

import json
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import aiohttp

from fastchat.api.answer_reader import AnswerReader, error_of
from fastchat.config import dial_url
from fastchat.errors import AuthenticationError, FastChatError, RequestError, UnavailableError

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=600.0)
_LIST_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_MAX_ERROR_BYTES = 2**20


Judgement = Literal["up", "down", "flag"]


@dataclass(frozen=True, slots=True)
class AnswerMark:
    """Which answer of which model a message is, and how it was judged."""

    answer_id: str
    model: str
    vote: Judgement | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. An answer's `mark` is for votes on it and is no part of what models read."""

    role: Literal["system", "user", "assistant"]
    text: str
    mark: AnswerMark | None = None


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """What a person asked for: checked values only. None leaves a value to the server."""

    model: str
    messages: tuple[Message, ...]
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def body(self) -> dict[str, Any]:  # Any: JSON
        """The request's JSON body."""
        options = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }
        return {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.text} for message in self.messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            **{name: value for name, value in options.items() if value is not None},
        }


@dataclass(slots=True)
class AnswerFacts:
    """What is known of an answer beside its text. Times are in seconds since it was asked for."""

    began: float
    answer_id: str | None = None
    first_text_s: float | None = None
    total_s: float = 0.0
    num_prompt_tokens: int | None = None
    num_generated_tokens: int | None = None
    finish_reason: str | None = None


class ApiClient:
    """One session to the API server, opened by the page's life."""

    def __init__(self, api_url: str, *, api_key: str | None = None) -> None:
        self._api_url = api_url
        self._base_url = dial_url(api_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[None]:
        """The session, for as long as the process lives."""
        connector = aiohttp.TCPConnector(limit=0)  # the scheduler decides how many answers run
        async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT, headers=self._headers) as session:
            self._session = session
            yield

    async def list_models(self) -> tuple[str, ...]:
        """The names that are served now."""
        with self._translated():
            async with self._opened.get(f"{self._base_url}/v1/models", timeout=_LIST_TIMEOUT) as response:
                if response.status != 200:
                    raise await self._refusal(response)
                raw = await response.read()
        try:
            return tuple(str(card["id"]) for card in json.loads(raw)["data"])
        except (ValueError, KeyError, TypeError):
            raise UnavailableError(f"{self._api_url}/v1/models is not a list of models.") from None

    async def stream(self, request: ChatRequest, facts: AnswerFacts) -> AsyncGenerator[str, None]:
        """The answer's text in pieces as they come. Closing the generator ends the answer on the worker."""
        async with aclosing(self.stream_bytes("/v1/chat/completions", request.body())) as pieces:
            async for text in self._texts(pieces, facts):
                yield text

    async def stream_bytes(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[bytes, None]:
        """What comes back to a POST, as it comes."""
        with self._translated():
            response = await self._opened.post(f"{self._base_url}{path}", json=body)
        try:
            if response.status != 200:
                raise await self._refusal(response)
            while True:
                with self._translated():
                    received = await response.content.readany()
                if not received:
                    return
                yield received
        finally:
            response.close()  # the server aborts an answer that nobody reads

    async def get_json(self, path: str, query: Mapping[str, str]) -> Any:  # Any: JSON
        """The answer to a GET."""
        with self._translated():
            async with self._opened.get(f"{self._base_url}{path}", params=query, timeout=_LIST_TIMEOUT) as response:
                return await self._json_of(response)

    async def post_json(self, path: str, body: Mapping[str, Any]) -> Any:  # Any: JSON
        """The answer to a POST."""
        with self._translated():
            async with self._opened.post(f"{self._base_url}{path}", json=body, timeout=_LIST_TIMEOUT) as response:
                return await self._json_of(response)

    async def _json_of(self, response: aiohttp.ClientResponse) -> Any:
        if response.status != 200:
            raise await self._refusal(response)
        try:
            return json.loads(await response.read())
        except ValueError:
            raise UnavailableError(f"{self._api_url} answers with something that is not JSON.") from None

    async def _texts(self, pieces: AsyncIterator[bytes], facts: AnswerFacts) -> AsyncIterator[str]:
        reader = AnswerReader()
        async for received in pieces:
            text = reader.push(received)
            facts.total_s = time.monotonic() - facts.began
            facts.answer_id = reader.answer_id
            facts.num_prompt_tokens = reader.num_prompt_tokens
            facts.num_generated_tokens = reader.num_generated_tokens
            facts.finish_reason = reader.finish_reason
            if text:
                if facts.first_text_s is None:
                    facts.first_text_s = facts.total_s
                yield text
            if reader.is_done:
                return
        raise UnavailableError("The answer ended before it was complete.", code="stream_lost")

    @property
    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "keep_open() comes first"
        return self._session

    async def _refusal(self, response: aiohttp.ClientResponse) -> FastChatError:
        with self._translated():
            raw = await response.content.read(_MAX_ERROR_BYTES)
        try:
            error = error_of(json.loads(raw), status=response.status)
        except ValueError:
            error = None
        if response.status == 401:
            return AuthenticationError(error.message if error else "The API server wants a key.")
        if error is not None:
            return error
        reason = f"{self._api_url} answers {response.status} {response.reason}."
        return RequestError(reason) if 400 <= response.status < 500 else UnavailableError(reason)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            number = error.os_error.errno
            reason = os.strerror(number) if number and number > 0 else str(error)
            raise UnavailableError(f"{self._api_url} does not answer ({reason}).", code="no_api_server") from error
        except TimeoutError as error:
            raise UnavailableError(f"{self._api_url} does not answer in time.", code="no_api_server") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"The connection to {self._api_url} was lost.", code="stream_lost") from error


def as_messages(system: str, turns: Sequence[Message]) -> tuple[Message, ...]:
    """The messages of a request: the system prompt, if there is one, and the turns.

    What one speaker says twice in a row is one message: a question whose answer was stopped or failed before its first
    word, and the one after it. Many prompt formats refuse two questions without an answer between them.
    """
    said = [(role, "\n\n".join(turn.text for turn in run)) for role, run in groupby(turns, lambda turn: turn.role)]
    return (*((Message("system", system),) if system.strip() else ()), *(Message(*each) for each in said))
