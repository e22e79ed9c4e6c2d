"""POST /v1/embeddings: the mean of the last hidden states over a text's tokens, L2-normalised.

The hidden states are those after the model's final norm, which is what its output head reads: FastChat took the same,
so vectors stored with it stay comparable. Every text is computed for itself, so a vector never depends on its batch.
"""

from __future__ import annotations

import asyncio
import base64
import math
import secrets
import struct
import time
from collections.abc import Sequence
from typing import Any

import orjson

from fastchat.api.chat import cache_salt
from fastchat.api.event_source import open_sequences
from fastchat.api.generation import EndReason, RecordHook, RequestRecord, Usage, deadline_error
from fastchat.api.off_the_loop import off_the_loop
from fastchat.api.parameters import Ignored
from fastchat.api.protocol import EmbeddingRequest
from fastchat.api.request_context import RequestContext
from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.api.text_work import check_lengths, parsed, prompts_ids
from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.errors import ContextLengthError, EngineError, FastChatError, InvalidRequestError, UnavailableError

Vector = tuple[float, ...]


async def prepare_embeddings(
    models: ServedModels,
    document: dict[str, Any],  # Any: JSON has any value
    context: RequestContext,
    on_record: RecordHook,
) -> EmbeddingAnswer:
    """A checked and tokenized request; nothing runs yet. Raises `RequestError`."""
    body, ignored = await parsed(EmbeddingRequest, document)
    model = models.find(body.model)
    _check_dimensions(body.dimensions, model)
    if not model.truncates_embedding_input:
        check_lengths(model, body.input, param="input")
    inputs = [_fitted(model, ids) for ids in await prompts_ids(model, body.input, param="input")]
    return EmbeddingAnswer(model, body, context, inputs=inputs, ignored=ignored, on_record=on_record)


class EmbeddingAnswer:
    """The vectors of one request."""

    def __init__(
        self,
        model: ServedModel,
        body: EmbeddingRequest,
        context: RequestContext,
        *,
        inputs: list[tuple[int, ...]],
        ignored: Ignored,
        on_record: RecordHook,
    ) -> None:
        self.ignored = ignored
        self._model = model
        self._body = body
        self._context = context
        self._inputs = inputs
        self._on_record = on_record
        self._began_at = time.monotonic()
        self._as_base64 = body.encoding_format == "base64" and not context.wants_float_embeddings

    async def whole(self) -> bytes:
        """Compute all inputs at once and write the answer. One that fails ends all of them."""
        reason: EndReason = "abort"
        try:
            async with asyncio.timeout(self._context.deadline_s):
                vectors = await self._compute()
            reason = "stop"
        except TimeoutError:
            reason = "error"
            raise deadline_error() from None
        except FastChatError:
            reason = "error"
            raise
        finally:
            self._on_record(self._record(reason))
        return await off_the_loop(lambda: self._write(vectors), size=sum(map(len, vectors)))

    def _write(self, vectors: Sequence[Vector]) -> bytes:
        """Written one by one: many vectors in one call of the serializer would hold up every thread."""
        num_tokens = sum(len(token_ids) for token_ids in self._inputs)
        entries = [
            orjson.dumps({"object": "embedding", "index": index, "embedding": self._written(vector)})
            for index, vector in enumerate(vectors)
        ]
        rest = {"model": self._body.model, "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens}}
        return b'{"object":"list","data":[' + b",".join(entries) + b"]," + orjson.dumps(rest)[1:]

    async def _compute(self) -> list[Vector]:
        requests = self._requests()
        vectors: dict[str, Vector] = {}
        async with open_sequences(self._model, requests) as source:
            while len(vectors) < len(requests):
                for event in await source.next_events():
                    if event.finish_reason is FinishReason.ABORT:
                        raise UnavailableError("The model's worker is shutting down.", code="shutting_down")
                    if event.finish_reason is not None:
                        if event.embedding is None:
                            raise EngineError(event.error or "the engine returned no embedding")
                        vectors[event.sequence_id] = _normalised(event.embedding)
        return [vectors[request.sequence_id] for request in requests]

    def _requests(self) -> list[SequenceRequest]:
        prefix = f"{self._context.request_id}-{secrets.token_hex(4)}"
        return [
            SequenceRequest(
                sequence_id=f"{prefix}-{index}",
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=0),
                cache_salt=cache_salt(self._context, None),
                priority=self._context.priority,
                adapter=self._model.adapter,
                wants_embedding=True,
            )
            for index, token_ids in enumerate(self._inputs)
        ]

    def _written(self, vector: Vector) -> str | Vector:
        if self._as_base64:
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
        return vector

    def _record(self, reason: EndReason) -> RequestRecord:
        num_tokens = sum(len(token_ids) for token_ids in self._inputs)
        return RequestRecord(
            request_id=self._context.request_id,
            tenant=self._context.tenant,
            model=self._body.model,
            usage=Usage(num_tokens, 0, 0),
            reason=reason,
            duration_s=time.monotonic() - self._began_at,
        )


def _normalised(vector: Vector) -> Vector:
    """The same direction with length 1; a vector of zeros stays. Raises `EngineError` for what is not numbers."""
    length = math.sqrt(math.fsum(value * value for value in vector))
    if not math.isfinite(length):
        raise EngineError("the model gave a vector that is not of numbers")
    return tuple(value / length for value in vector) if length else vector


def _check_dimensions(wanted: int | None, model: ServedModel) -> None:
    size = model.engine.limits.embedding_size
    if wanted is not None and wanted != size:
        raise InvalidRequestError(
            f"dimensions must be {size}: this model's vectors cannot be shortened.",
            param="dimensions",
            code="invalid_value",
        )


def _fitted(model: ServedModel, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """An input that fits the context; one that is too long is cut only where the operator asked for it."""
    if len(token_ids) <= model.max_context:
        return token_ids
    if model.truncates_embedding_input:
        return token_ids[: model.max_context]
    raise ContextLengthError(
        num_prompt_tokens=len(token_ids), max_tokens=0, max_context=model.max_context, param="input"
    )
