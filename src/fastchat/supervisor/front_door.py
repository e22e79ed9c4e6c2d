"""Whether the API server shows what was started: asked of it as a client would."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection

import aiohttp
import structlog

PAUSE_S = 0.1
ANSWER_LIMIT_S = 5.0
REMIND_AFTER_S = 30.0

_log = structlog.stdlib.get_logger(__name__)


async def wait_until_listed(api_url: str, names: Collection[str], *, api_key: str | None) -> None:
    """Return when the API server lists all `names`; says every half minute which one is missing.

    Every process has said that it is ready before this is called, so it asks a few times at most. It asks because the
    API server's table follows the controller's, and only the API server knows when it has.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    remind_at = time.monotonic() + REMIND_AFTER_S
    async with aiohttp.ClientSession(timeout=timeout, headers=headers, trust_env=False) as session:
        while missing := set(names) - await _listed(session, api_url):
            if time.monotonic() >= remind_at:
                _log.warning("the API server does not list a model yet", model=",".join(sorted(missing)), url=api_url)
                remind_at = time.monotonic() + REMIND_AFTER_S
            await asyncio.sleep(PAUSE_S)


async def _listed(session: aiohttp.ClientSession, api_url: str) -> set[str]:
    try:
        # Our own child on this machine: its certificate is made out to the name that clients use.
        async with session.get(f"{api_url}/v1/models", ssl=False) as response:
            document = await response.json()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return set()
    return {card["id"] for card in document.get("data", ())}
