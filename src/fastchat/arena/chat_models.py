"""What the arena needs of the process that it lives in: who is served, who asks, and a stream from a model.

The API server's gateway gives it; the arena knows no relay and no worker.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from starlette.requests import Request

from fastchat.errors import UnavailableError


class ChatEvents(Protocol):
    """Whole server-sent events, some in each piece. Closing it ends the answer on its worker."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def aclose(self) -> None:
        """Release the worker."""


class ChatModels(Protocol):
    """The served models, as far as they can be chatted with."""

    def tenant_of(self, request: Request) -> str:
        """Who sends `request`, as an opaque id."""

    def check_served(self, model: str) -> None:
        """Raise `ModelNotFoundError` or `UnavailableError` for a model that cannot be asked."""

    def distinct_models(self) -> list[str]:
        """The models that can be chatted with now, each under one name."""

    async def open_chat(self, document: dict[str, Any], *, tenant: str, is_secret: bool) -> ChatEvents:  # Any: JSON
        """The events of a streamed chat completion; `is_secret` keeps the model's name out of the metrics."""


def draw(pool: Sequence[str], number: int) -> tuple[str, ...]:
    """`number` different models of `pool`, each choice and each order equally likely, by the system's randomness."""
    if len(pool) < number:
        served = ", ".join(pool) or "none"
        raise UnavailableError(
            f"A blind round needs {number} models; served now: {served}. Start another worker.", code="too_few_models"
        )
    return tuple(secrets.SystemRandom().sample(sorted(pool), number))
