"""Routes of another part that live in the API server's process: behind its key, in its document, with its relay.

The gateway knows nothing of such a part but this; the command puts them together.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from fastchat.gateway.chat_door import ChatDoor
from fastchat.gateway.openapi import Operation

Endpoint = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class MountedRoutes:
    """`keep_open` is entered when the app starts, before its first request, and left when it ends."""

    routes: tuple[tuple[Operation, Endpoint], ...]
    keep_open: Callable[[ChatDoor], AbstractAsyncContextManager[None]]
