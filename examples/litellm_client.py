"""litellm as a client: chat, stream, asynchronous, text completion, embeddings, errors.

pip install litellm
OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=EMPTY python examples/litellm_client.py chatglm2-6b
"""

import asyncio
import os
import sys
from importlib.metadata import version

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it fetches a list of prices when imported

import litellm

litellm.suppress_debug_info = True
model = sys.argv[1] if len(sys.argv) > 1 else "chatglm2-6b"
server = {"api_base": os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"), "api_key": "EMPTY"}
asked = {"model": f"openai/{model}", "temperature": 0, "max_tokens": 24, **server}
messages = [{"role": "user", "content": "Hello! What is your name?"}]

answer = litellm.completion(messages=messages, **asked)
whole = answer.choices[0].message.content
print(whole)
assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens

chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **asked))
assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
assert litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message.content == whole


async def ask_asynchronously() -> None:
    """Whole and streamed at once."""

    async def joined() -> str:
        stream = await litellm.acompletion(messages=messages, stream=True, **asked)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    full, text = await asyncio.gather(litellm.acompletion(messages=messages, **asked), joined())
    assert full.choices[0].message.content == text == whole


asyncio.run(ask_asynchronously())

text = litellm.text_completion(prompt="Once upon a time", **{**asked, "model": f"text-completion-openai/{model}"})
assert isinstance(text.choices[0].text, str)
vectors = litellm.embedding(model=f"openai/{model}", input=["你好", "Hello"], **server)
assert len(vectors.data) == 2

for error_class, wrong in (
    (litellm.NotFoundError, {"model": "openai/nobody-serves-this"}),
    (litellm.BadRequestError, {"temperature": 9}),
):
    try:
        litellm.completion(messages=messages, **{**asked, **wrong})
    except error_class as error:
        assert error.status_code in (400, 404), error
    else:
        raise AssertionError(f"{wrong} was answered")
print("litellm", version("litellm"), "works")
