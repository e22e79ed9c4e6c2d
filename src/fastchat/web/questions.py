"""What a browser sends, checked again here: its sliders and limits are only for people who use the page."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from fastchat.web.api_client import ChatRequest, Message, as_messages
from fastchat.web.failures import BadInputError, Failure

MAX_CHARACTERS = 4_000_000
"""Of a whole conversation. Every context that is served today ends earlier, with a message that counts tokens."""
_DIGITS = re.compile(r"-?[0-9]{1,20}")
_MAX_INT32 = 2**31 - 1
_INT64 = 2**63


@dataclass(frozen=True, slots=True)
class RawSettings:
    """The settings as they came: anything."""

    model: Any
    system: Any
    temperature: Any
    top_p: Any
    max_tokens: Any
    seed: Any


def chat_request(turns: Sequence[Message], raw: RawSettings, *, loading: Container[str] = ()) -> ChatRequest:
    """The request that these turns and settings mean. Raises `BadInputError`, also for a model that is `loading`."""
    if not isinstance(raw.model, str) or not raw.model:
        raise BadInputError(Failure("error_no_model"))
    if raw.model in loading:
        raise BadInputError(Failure("error_loading", {"model": raw.model}))
    system = raw.system if isinstance(raw.system, str) else ""
    if sum(len(turn.text) for turn in turns) + len(system) > MAX_CHARACTERS:
        raise BadInputError(Failure("error_too_large", {"limit": str(MAX_CHARACTERS)}))
    if not turns or not turns[-1].text.strip():
        raise BadInputError(Failure("error_empty"))
    return ChatRequest(
        model=raw.model,
        messages=as_messages(system, turns),
        temperature=_number(raw.temperature, 0.0, 2.0, "error_temperature"),
        top_p=_number(raw.top_p, 1e-6, 1.0, "error_top_p"),
        max_tokens=_whole_number(raw.max_tokens, 1, _MAX_INT32, "error_max_tokens"),
        seed=_whole_number(raw.seed, -_INT64, _INT64 - 1, "error_seed"),
    )


def _number(value: Any, lowest: float, highest: float, key: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadInputError(Failure(key))
    if not lowest <= value <= highest:
        raise BadInputError(Failure(key))
    return float(value)


def _whole_number(value: Any, lowest: int, highest: int, key: str) -> int | None:
    """A number, or the text of one; nothing and an empty text mean none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, str) and _DIGITS.fullmatch(value.strip()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise BadInputError(Failure(key))
    return value
