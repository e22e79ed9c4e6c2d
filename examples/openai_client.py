"""openai 1.x, 2.x and 3.x: chat, completions, streams, embeddings, models, and every error as its own class.

pip install openai
OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=EMPTY python examples/openai_client.py chatglm2-6b
"""

import asyncio
import math
import sys
from collections.abc import Callable
from typing import Any

import openai

model = sys.argv[1] if len(sys.argv) > 1 else "chatglm2-6b"
client = openai.OpenAI()
messages = [{"role": "user", "content": "Hello! What is your name?"}]
greedy = {"model": model, "max_tokens": 24, "temperature": 0}


def expect(error_class: type[Exception], code: str | None, **request: object) -> None:
    """The request must be refused with this class and code."""
    try:
        client.chat.completions.create(**request)
    except error_class as error:
        assert error.code == code, error
    else:
        raise AssertionError(f"{request} was answered")


# Chat, whole and streamed.
answer = client.chat.completions.create(messages=messages, **greedy)
whole = answer.choices[0].message.content
print(whole)
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

chunks = list(
    client.chat.completions.create(messages=messages, stream=True, stream_options={"include_usage": True}, **greedy)
)
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
assert chunks[-1].usage == answer.usage
assert chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason

# Several choices; the same seed gives the same text.
seeded = {"model": model, "max_tokens": 8, "temperature": 1.0, "n": 3, "seed": 7, "messages": messages}
first, second = (client.chat.completions.create(**seeded) for _ in range(2))
assert [c.message.content for c in first.choices] == [c.message.content for c in second.choices]

# Log probabilities.
entries = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, **greedy).choices[0].logprobs
assert len(entries.content) > 0
assert len(entries.content[0].top_logprobs) == 2

# Completions, whole and streamed.
completion = client.completions.create(prompt="Once upon a time", **greedy)
streamed = client.completions.create(prompt="Once upon a time", stream=True, **greedy)
assert "".join(chunk.choices[0].text for chunk in streamed) == completion.choices[0].text

# Embeddings: unit vectors (the client asks for base64 by itself).
vectors = [item.embedding for item in client.embeddings.create(model=model, input=["你好", "Hello"]).data]
assert all(abs(math.sqrt(sum(x * x for x in vector)) - 1) < 1e-3 for vector in vectors)

# Models.
assert model in [card.id for card in client.models.list()]
assert client.models.retrieve(model).id == model

# Errors.
expect(openai.NotFoundError, "model_not_found", model="nobody-serves-this", messages=messages)
expect(openai.BadRequestError, "context_length_exceeded", model=model, messages=messages, max_tokens=10_000_000)
try:
    client.chat.completions.create(model=model, messages=messages, temperature=9)
except openai.BadRequestError as error:
    assert error.param == "temperature", error
else:
    raise AssertionError("temperature 9 was answered")


async def ask_asynchronously() -> None:
    """The asynchronous client: several streams at once, and its `.stream()` helper."""
    async with openai.AsyncOpenAI() as asynchronous:

        async def read_stream() -> str:
            stream = await asynchronous.chat.completions.create(messages=messages, stream=True, **greedy)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        assert await asyncio.gather(*(read_stream() for _ in range(4))) == [whole] * 4
        async with helper_of(asynchronous)(messages=messages, **greedy) as stream:
            deltas = [event.delta async for event in stream if event.type == "content.delta"]
            check_final(deltas, stream.current_completion_snapshot)
        vectors = (await asynchronous.embeddings.create(model=model, input=["Hello", "你好"])).data
        assert len(vectors[0].embedding) == len(vectors[1].embedding) > 1
        assert model in [card.id async for card in asynchronous.models.list()]


def helper_of(any_client: openai.OpenAI | openai.AsyncOpenAI) -> Callable[..., Any]:
    """`.stream()`, which early versions of openai 1.x have under `beta`."""
    completions = any_client.chat.completions
    return completions.stream if hasattr(completions, "stream") else any_client.beta.chat.completions.stream


def check_final(deltas: list[str], final: Any) -> None:
    """The helper's events and what it made of them are the whole answer."""
    assert "".join(deltas) == final.choices[0].message.content == whole
    assert final.choices[0].message.role == "assistant"


with helper_of(client)(messages=messages, **greedy) as events:
    check_final([event.delta for event in events if event.type == "content.delta"], events.current_completion_snapshot)
asyncio.run(ask_asynchronously())
print("openai", openai.__version__, "works")
