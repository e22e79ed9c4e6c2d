"""The terminal's connection to a server: requests, streams, and every failure as one of our errors in one line."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from typing import Any

import aiohttp

from fastchat.api.answer_reader import error_of
from fastchat.config import dial_url
from fastchat.errors import AuthenticationError, FastChatError, RequestError, UnavailableError

_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=600.0)
"""A long prompt may take minutes before its first word; a person is there to press Ctrl-C."""
_MAX_ERROR_BYTES = 2**20


class HttpConnection:
    """Talks to the routes below `base_url`. Used on one event loop; `open` first and `close` at the end."""

    def __init__(self, base_url: str, *, api_key: str | None) -> None:
        self.base_url = base_url
        self._dial_url = dial_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def open(self) -> None:
        """Make ready; nothing is sent yet."""
        # A connection that waited while a person typed may be closed by now; a new one costs a millisecond.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(force_close=True), timeout=_TIMEOUT, headers=self._headers
        )

    async def close(self) -> None:
        """End what runs. May be called twice, and without `open`."""
        if self._session is not None:
            await self._session.close()

    async def get(self, path: str, *, what: str) -> Any:  # Any: JSON, here and below
        """The JSON that a route answers; `what` says in an error what it should have been."""
        with self._translated():
            async with self._opened.get(self._dial_url + path) as response:
                return await self._document(response, path, what)

    async def post(self, path: str, body: Mapping[str, Any], *, what: str) -> Any:
        """The JSON that a route answers to `body`."""
        with self._translated():
            async with self._opened.post(self._dial_url + path, json=body) as response:
                return await self._document(response, path, what)

    async def delete(self, path: str, *, what: str) -> Any:
        """The JSON that a route answers."""
        with self._translated():
            async with self._opened.delete(self._dial_url + path) as response:
                return await self._document(response, path, what)

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of a streamed answer as they come; leaving the block, by any way, ends it on the server."""
        with self._translated():
            response = await self._opened.post(self._dial_url + path, json=body)
        try:
            if response.status != 200:
                raise await self._refusal(response)
            async with aclosing(self._received(response)) as received:
                yield received
        finally:
            response.close()  # the server aborts an answer that nobody reads

    @property
    def _opened(self) -> aiohttp.ClientSession:
        assert self._session is not None, "open() comes first"
        return self._session

    async def _received(self, response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        while True:
            with self._translated():
                received = await response.content.readany()
            if not received:
                return
            yield received

    async def _document(self, response: aiohttp.ClientResponse, path: str, what: str) -> Any:
        if response.status != 200:
            raise await self._refusal(response)
        try:
            return json.loads(await response.read())
        except ValueError:
            raise UnavailableError(
                f"{self.base_url}{path} is not {what}; is this an OpenAI-compatible server?"
            ) from None

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
        if error is not None and (response.status != 404 or error.code is not None):
            return error  # a 404 without a code is another server's, such as our own page's
        if 400 <= response.status < 500:
            return RequestError(f"{response.url} answers {reason}; is --url right?")
        return UnavailableError(f"{self.base_url} answers {reason}.")

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """The HTTP client's errors as ours, each one line."""
        try:
            yield
        except aiohttp.ClientConnectorError as error:
            raise UnavailableError(
                f"{self.base_url} does not answer ({_system_reason(error.os_error)}); "
                "start a server with `fastchat serve`, or give its address with --url."
            ) from error
        except TimeoutError as error:
            raise UnavailableError(f"{self.base_url} does not answer within the time limit.") from error
        except (aiohttp.ClientError, OSError) as error:
            raise UnavailableError(f"The connection to {self.base_url} was lost ({_reason(error)}).") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _system_reason(error: OSError) -> str:
    """`Connection refused` where the system gave a number, which asyncio words in its own way."""
    return os.strerror(error.errno) if error.errno and error.errno > 0 else _reason(error)
