"""Whether the API server has seen what was started: asked of it as a load balancer would, which needs no key."""

from __future__ import annotations

import asyncio
import time

import aiohttp
import structlog

PAUSE_S = 0.1
ANSWER_LIMIT_S = 5.0
REMIND_AFTER_S = 30.0

_log = structlog.stdlib.get_logger(__name__)


async def wait_until_ready(api_url: str, num_workers: int) -> None:
    """Return when the API server can send requests to so many workers; says every half minute how many it sees.

    Every process has said that it is ready before this is called, so it asks a few times at most. It asks because the
    API server's table follows the controller's, and only the API server knows when it has.
    """
    timeout = aiohttp.ClientTimeout(total=ANSWER_LIMIT_S)
    remind_at = time.monotonic() + REMIND_AFTER_S
    async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
        while (num_ready := await _num_ready(session, api_url)) < num_workers:
            if time.monotonic() >= remind_at:
                _log.warning("the API server waits for workers", num_ready=num_ready, num_workers=num_workers)
                remind_at = time.monotonic() + REMIND_AFTER_S
            await asyncio.sleep(PAUSE_S)


async def _num_ready(session: aiohttp.ClientSession, api_url: str) -> int:
    try:
        # Our own child on this machine: its certificate is made out to the name that clients use.
        async with session.get(f"{api_url}/health", ssl=False) as response:
            document = await response.json()
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
        return 0
    return int(document.get("num_workers", 0))
