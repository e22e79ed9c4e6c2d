"""What the API server tells a worker about a request beside its body: headers. What is absent is made up."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass

from fastchat.cluster.contract import (
    COUNTED_HEADER,
    CREATED_HEADER,
    DEADLINE_HEADER,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    RESUME_HEADER,
    SEED_HEADER,
    TAGS_HEADER,
    TENANT_HEADER,
)
from fastchat.errors import InvalidRequestError

_OLD_CLIENT = "OpenAI/v1 PythonBindings/"
"""How openai 0.28 names itself. It asks for base64 embeddings and cannot read them where numpy is absent."""

_INTEGER = re.compile(r"-?[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class RequestContext:
    """One request's identity. `created` in seconds since 1970; `deadline_s` in seconds from its arrival.

    `num_counted_tokens`: answer ids that another worker has put on record, with the prompt; None: none has.
    """

    request_id: str
    created: int
    tenant: str = ""
    seed: int | None = None
    priority: int = 0
    deadline_s: float | None = None
    wants_tags: bool = False
    is_resume: bool = False
    num_counted_tokens: int | None = None
    wants_float_embeddings: bool = False

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], *, request_id: str | None = None) -> RequestContext:
        """Read the headers of a request that carried the cluster token. Raises `InvalidRequestError`."""
        return cls(
            request_id=request_id or headers.get(REQUEST_ID_HEADER) or secrets.token_hex(16),
            created=_integer(headers, CREATED_HEADER, default=int(time.time())),
            tenant=headers.get(TENANT_HEADER, ""),
            seed=_integer(headers, SEED_HEADER) if SEED_HEADER in headers else None,
            priority=_integer(headers, PRIORITY_HEADER),
            deadline_s=_seconds(headers, DEADLINE_HEADER),
            wants_tags=headers.get(TAGS_HEADER) == "1",
            is_resume=headers.get(RESUME_HEADER) == "1",
            num_counted_tokens=_integer(headers, COUNTED_HEADER) if COUNTED_HEADER in headers else None,
            wants_float_embeddings=headers.get("user-agent", "").startswith(_OLD_CLIENT),
        )


def _integer(headers: Mapping[str, str], name: str, *, default: int = 0) -> int:
    text = headers.get(name, str(default))
    value = int(text) if _INTEGER.fullmatch(text) else None
    if value is None or not -(2**63) <= value < 2**63:
        raise InvalidRequestError(f"The header {name} must be an integer of 64 bits.", code="invalid_header")
    return value


def _seconds(headers: Mapping[str, str], name: str) -> float | None:
    if name not in headers:
        return None
    try:
        seconds = float(headers[name])
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:  # NaN fails too
        raise InvalidRequestError(f"The header {name} must be a number of seconds.", code="invalid_header")
    return seconds
