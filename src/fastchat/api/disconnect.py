"""Work that ends when the client leaves. Web servers only *say* that a client left; nothing stops by itself.

Both users, a whole answer here and a stream in `event_stream.py`, run their work inside an `asyncio.timeout` whose
moment is "now" once the client has left: that cancels exactly this work and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.types import Receive

T = TypeVar("T")


class ClientLeftError(Exception):
    """The client closed its connection: nobody is left to be answered."""


async def run_until_disconnect(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled as soon as the client leaves; then `ClientLeftError` is raised.

    The request's body must have been read before.
    """
    try:
        async with asyncio.timeout(None) as patience:
            with expired_by_disconnect(request.receive, patience):
                return await work
    except TimeoutError:
        if patience.expired():
            raise ClientLeftError from None
        raise


@contextmanager
def expired_by_disconnect(receive: Receive, patience: asyncio.Timeout) -> Iterator[None]:
    """While the block runs, `patience` ends as soon as the client leaves."""
    watch = asyncio.get_running_loop().create_task(_expire_after_disconnect(receive, patience))
    try:
        yield
    finally:
        watch.cancel()


async def _expire_after_disconnect(receive: Receive, patience: asyncio.Timeout) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    patience.reschedule(asyncio.get_running_loop().time())
