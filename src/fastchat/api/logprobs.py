"""Log probabilities in the two shapes of OpenAI's API: objects with bytes for chat, parallel lists for completions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastchat.engine.events import TokenLogprobs
from fastchat.models.interface import Tokenizer

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot write (as OpenAI's API does)."""

Json = dict[str, Any]  # Any: JSON has any value


def chat_logprobs(tokenizer: Tokenizer, places: Iterable[TokenLogprobs]) -> Json:
    """`choices[].logprobs` of chat completions."""
    return {"content": [_chat_place(tokenizer, place) for place in places], "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, places: Iterable[TokenLogprobs], text_offsets: Iterable[int]) -> Json:
    """`choices[].logprobs` of completions. The first place of a prompt has null, since nothing predicts it."""
    places = list(places)
    return {
        "tokens": [_token_text(tokenizer, place.token_id) for place in places],
        "token_logprobs": [None if place.logprob is None else _finite(place.logprob) for place in places],
        "top_logprobs": [_top_by_text(tokenizer, place) for place in places],
        "text_offset": list(text_offsets),
    }


def _chat_place(tokenizer: Tokenizer, place: TokenLogprobs) -> Json:
    chosen = _chat_token(tokenizer, place.token_id, place.logprob)
    return {**chosen, "top_logprobs": [_chat_token(tokenizer, token_id, logprob) for token_id, logprob in place.top]}


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float | None) -> Json:
    return {
        "token": _token_text(tokenizer, token_id),
        "logprob": LEAST_LOGPROB if logprob is None else _finite(logprob),
        "bytes": list(_shown_bytes(tokenizer, token_id)),
    }


def _top_by_text(tokenizer: Tokenizer, place: TokenLogprobs) -> dict[str, float] | None:
    """Alternatives by their text, the most probable of equal texts; None where nothing was predicted."""
    if place.logprob is None:
        return None
    by_text: dict[str, float] = {}
    for token_id, logprob in (*place.top, (place.token_id, place.logprob)):
        by_text.setdefault(_token_text(tokenizer, token_id), _finite(logprob))
    return by_text


def _token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as text; a piece of a character as `bytes:\\xe4\\xbd`, OpenAI's form, so that no two look alike."""
    content = _shown_bytes(tokenizer, token_id)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def _shown_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """A token's bytes; a special token, which has none in a text, shows its name."""
    content = tokenizer.token_bytes(token_id)
    return content or tokenizer.decode([token_id], skip_special_tokens=False).encode("utf-8")


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
