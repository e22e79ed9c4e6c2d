"""POST /tokenize and /detokenize, in vLLM's shapes: what a prompt or a conversation is to the model, and back."""

from __future__ import annotations

from typing import Any

import orjson

from fastchat.api.off_the_loop import off_the_loop
from fastchat.api.parameters import Ignored
from fastchat.api.protocol import DetokenizeRequest, TokenizeRequest
from fastchat.api.served_model import ServedModels
from fastchat.api.text_work import chat_messages, check_token_ids, encode, parsed, render, unread_fields
from fastchat.errors import InvalidRequestError

Json = dict[str, Any]  # Any: JSON has any value


async def tokenize(models: ServedModels, document: Json) -> tuple[bytes, Ignored]:
    """`{"tokens", "count", "max_model_len"}` of a prompt or a conversation."""
    body, ignored = await parsed(TokenizeRequest, document)
    model = models.find(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequestError("Send either prompt or messages.", param="prompt", code="invalid_value")
    if body.messages is not None:
        if body.add_special_tokens:
            raise InvalidRequestError(
                "add_special_tokens is not supported with messages: the template decides.", param="add_special_tokens"
            )
        messages = chat_messages(body.messages)
        ignored = ignored.also(unread_fields(model, messages))
        token_ids = await render(model, messages, add_generation_prompt=body.add_generation_prompt is not False)
    else:
        token_ids = await encode(model, body.prompt or "", adds_prefix=body.add_special_tokens is not False)
    answer = {"tokens": token_ids, "count": len(token_ids), "max_model_len": model.max_context}
    return orjson.dumps(answer), ignored


async def detokenize(models: ServedModels, document: Json) -> tuple[bytes, Ignored]:
    """`{"prompt"}`: the text of ids, special tokens included."""
    body, ignored = await parsed(DetokenizeRequest, document)
    model = models.find(body.model)
    token_ids = check_token_ids(model, body.tokens, param="tokens")
    decode = model.tokenizer.decode
    text = await off_the_loop(lambda: decode(token_ids, skip_special_tokens=False), size=len(token_ids))
    return orjson.dumps({"prompt": text}), ignored
