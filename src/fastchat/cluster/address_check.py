"""Whether an address is what it claims to be, asked before the table tells others to send requests there.

Redirects are never followed, environment proxies are never used, and only the beginning of an answer is read.
"""

from __future__ import annotations

import asyncio

import aiohttp
import orjson

from fastchat.config import dial_url, parse_url
from fastchat.errors import ConfigError, InvalidRequestError

LIMIT_S = 5.0
_RETRY_S = 0.1
_MAX_BODY_BYTES = 4096


async def check_worker(session: aiohttp.ClientSession, address: str, *, worker_id: str, token: str) -> None:
    """Ask `address` for /livez and compare its worker id.

    A refused connection is tried again until the limit, because a worker registers while it begins to listen. Raises
    `InvalidRequestError` that says what was tried, what happened and which flag to use.
    """
    try:
        url = f"{dial_url(parse_url(address))}/livez"
    except ConfigError as error:
        raise InvalidRequestError(f"{error.message} Start the worker with --worker-address URL.") from error
    failure = "no answer"
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    failure = await _ask(session, url, worker_id, token)
                    break
                except aiohttp.ClientConnectorError as error:
                    failure = error.strerror or str(error)
                    await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        failure = f"{failure} within {LIMIT_S:.0f} s"
    except aiohttp.ClientError as error:
        failure = str(error) or type(error).__name__
    if failure:
        raise InvalidRequestError(
            f"the controller tried GET {url} and got: {failure}; start the worker with --worker-address set to the "
            "URL by which the controller and the API server reach it."
        )


async def is_listening(session: aiohttp.ClientSession, address: str) -> bool:
    """Whether anything at all answers HTTP at an external server's address; no token is sent."""
    try:
        async with asyncio.timeout(LIMIT_S), session.get(f"{dial_url(address)}/v1/models", allow_redirects=False):
            return True
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


async def _ask(session: aiohttp.ClientSession, url: str, worker_id: str, token: str) -> str:
    """ "" where the worker answers for itself, else what is wrong with the answer."""
    headers = {"Authorization": f"Bearer {token}"}
    async with session.get(url, headers=headers, allow_redirects=False) as response:
        if response.status != 200:
            return f"HTTP status {response.status}"
        body = await response.content.read(_MAX_BODY_BYTES)
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return "an answer that is not JSON"
    if not isinstance(answer, dict) or answer.get("worker_id") != worker_id:
        return "the answer of something else than this worker"
    return ""
