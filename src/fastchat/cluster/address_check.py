"""Whether an address is what it claims to be, asked before the table tells others to send requests there.

Redirects are never followed, environment proxies are never used, and only the beginning of an answer is read.
"""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

import aiohttp
import orjson

from fastchat.cluster.dial_rules import DialRules
from fastchat.config import dial_url, internal_url, is_loopback, parse_url
from fastchat.errors import ConfigError, InvalidRequestError

LIMIT_S = 5.0
_RETRY_S = 0.1
_MAX_BODY_BYTES = 4096


async def check_worker(
    session: aiohttp.ClientSession, rules: DialRules, address: str, *, worker_id: str, peer: str
) -> None:
    """Ask `address` for /livez and compare its worker id. No token is sent: it may be anybody's.

    A refused connection is tried again until the limit, because a worker registers while it begins to listen. `peer` is
    the address that the worker's control connection comes from. Raises `InvalidRequestError` that says what was tried,
    what happened and which flag to use.
    """
    try:
        url = f"{dial_url(parse_url(address))}/livez"
    except ConfigError as error:
        raise InvalidRequestError(f"{error.message} Start the worker with --worker-address URL.") from error
    _check_machine(address, peer)
    await rules.check(url)
    failure = "no answer"
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                try:
                    failure = await _ask(session, url, worker_id)
                    break
                except aiohttp.ClientSSLError:
                    raise
                except aiohttp.ClientConnectorError as error:
                    failure = error.strerror or str(error)
                    await asyncio.sleep(_RETRY_S)
    except TimeoutError:
        failure = f"{failure} within {LIMIT_S:.0f} s"
    except aiohttp.ClientSSLError as error:
        failure = f"{error}; the controller must trust its certificate (SSL_CERT_FILE), and the URL must name its host"
    except aiohttp.ClientError as error:
        failure = str(error) or type(error).__name__
    if failure:
        raise InvalidRequestError(
            f"the controller tried GET {url} and got: {failure}; start the worker with --worker-address set to the "
            "URL by which the controller and the API server reach it."
        )


def _check_machine(address: str, peer: str) -> None:
    """A worker of another machine that names its own loopback would send everybody to themselves."""
    host = urlsplit(address).hostname or ""
    if is_loopback(host) and not is_loopback(peer):
        url = internal_url(peer, urlsplit(address).port or 80)
        raise InvalidRequestError(
            f"the worker says that it is at {address}, and that means another machine here: its connection comes from "
            f"{peer}. Start the worker with --host 0.0.0.0, and if that is not enough --worker-address {url}."
        )


async def is_listening(session: aiohttp.ClientSession, address: str) -> bool:
    """Whether anything at all answers HTTP at an external server's address; no token is sent."""
    try:
        async with asyncio.timeout(LIMIT_S), session.get(f"{dial_url(address)}/v1/models", allow_redirects=False):
            return True
    except (aiohttp.ClientError, OSError, TimeoutError):
        return False


async def _ask(session: aiohttp.ClientSession, url: str, worker_id: str) -> str:
    """ "" where the worker answers for itself, else what is wrong with the answer."""
    async with session.get(url, allow_redirects=False) as response:
        if 300 <= response.status < 400:
            return f"HTTP status {response.status}, a redirect, which is not followed"
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
