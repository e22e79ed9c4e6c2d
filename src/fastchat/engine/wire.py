"""Frames between a process and the engine it spawned: a 4-byte big-endian length, then a JSON array.

    to the engine:    ["add", request]  ["abort", sequence_id]  ["adapter", number, name, source]  ["stop"]
    from the engine:  ["ready", limits]  ["failed", kind, message]  ["step", [event, ...], stats]
                      ["settled", number]  ["settled", number, kind, message]

JSON, because nothing on this socket may be able to run code. Torch-free.
"""

from __future__ import annotations

import json
import struct
from dataclasses import asdict, fields
from typing import Any

from fastchat.engine.client import EngineLimits
from fastchat.engine.events import EngineStats, FinishReason, SequenceEvent, SequenceRequest, TokenLogprobs
from fastchat.engine.sampling_params import SamplingParams

HEADER = struct.Struct(">I")
MAX_FRAME_BYTES = 1 << 28

Json = Any  # Any: a JSON value, checked by the decoder that reads it


def pack(message: list[Json]) -> bytes:
    """One frame."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return HEADER.pack(len(body)) + body


def unpack_length(header: bytes) -> int:
    """The body's length in bytes. Raises `ValueError` for a frame that is too large."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes is larger than {MAX_FRAME_BYTES}")
    return int(length)


def unpack(body: bytes) -> list[Json]:
    """The message in a frame's body."""
    message = json.loads(body)
    if not isinstance(message, list):
        raise TypeError("a frame must be a JSON array")
    return message


def encode_request(request: SequenceRequest) -> Json:
    """A `SequenceRequest` as JSON."""
    encoded = {field.name: getattr(request, field.name) for field in fields(request)}
    sampling = request.sampling
    encoded["sampling"] = {field.name: getattr(sampling, field.name) for field in fields(sampling)} | {
        "eos_token_ids": sorted(sampling.eos_token_ids),
        "stop_token_ids": sorted(sampling.stop_token_ids),
    }
    return encoded


def decode_request(encoded: Json) -> SequenceRequest:
    """The inverse of `encode_request`."""
    sampling = encoded["sampling"]
    sampling["eos_token_ids"] = frozenset(sampling["eos_token_ids"])
    sampling["stop_token_ids"] = frozenset(sampling["stop_token_ids"])
    sampling["logit_bias"] = tuple((token_id, bias) for token_id, bias in sampling["logit_bias"])
    encoded["sampling"] = SamplingParams(**sampling)
    encoded["prompt_token_ids"] = tuple(encoded["prompt_token_ids"])
    encoded["emitted_token_ids"] = tuple(encoded["emitted_token_ids"])
    return SequenceRequest(**encoded)


def encode_event(event: SequenceEvent) -> Json:
    """A `SequenceEvent` as JSON; what is empty is left out."""
    encoded: dict[str, Json] = {"sequence_id": event.sequence_id, "token_ids": event.token_ids}
    if event.num_cached_tokens:
        encoded["num_cached_tokens"] = event.num_cached_tokens
    if event.logprobs:
        encoded["logprobs"] = [_encode_logprobs(entry) for entry in event.logprobs]
    if event.prompt_logprobs:
        encoded["prompt_logprobs"] = [_encode_logprobs(entry) for entry in event.prompt_logprobs]
    if event.finish_reason is not None:
        encoded |= {
            "finish_reason": event.finish_reason.value,
            "embedding": event.embedding,
            "error": event.error,
        }
    return encoded


def decode_event(encoded: Json) -> SequenceEvent:
    """The inverse of `encode_event`."""
    reason = encoded.get("finish_reason")
    embedding = encoded.get("embedding")
    return SequenceEvent(
        encoded["sequence_id"],
        token_ids=tuple(encoded["token_ids"]),
        logprobs=tuple(_decode_logprobs(entry) for entry in encoded.get("logprobs", ())),
        finish_reason=None if reason is None else FinishReason(reason),
        num_cached_tokens=encoded.get("num_cached_tokens", 0),
        prompt_logprobs=tuple(_decode_logprobs(entry) for entry in encoded.get("prompt_logprobs", ())),
        embedding=None if embedding is None else tuple(embedding),
        error=encoded.get("error"),
    )


def encode_stats(stats: EngineStats) -> Json:
    """An `EngineStats` as JSON."""
    return asdict(stats)


def decode_stats(encoded: Json) -> EngineStats:
    """The inverse of `encode_stats`."""
    return EngineStats(**encoded)


def encode_limits(limits: EngineLimits) -> Json:
    """An `EngineLimits` as JSON."""
    return asdict(limits)


def decode_limits(encoded: Json) -> EngineLimits:
    """The inverse of `encode_limits`."""
    return EngineLimits(**encoded)


def _encode_logprobs(entry: TokenLogprobs) -> Json:
    return [entry.token_id, entry.logprob, entry.top]


def _decode_logprobs(encoded: Json) -> TokenLogprobs:
    token_id, logprob, top = encoded
    return TokenLogprobs(token_id, logprob, tuple((other, value) for other, value in top))
