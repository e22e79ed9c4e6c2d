"""openai 1.x, 2.x and 3.x: every error is its own class, and the server counts what the client repeats.

pip install openai
OPENAI_BASE_URL=http://localhost:8000/v1 OPENAI_API_KEY=EMPTY python examples/openai_errors.py chatglm2-6b

With FASTCHAT_BUSY_URL, a server without a controller, the repeated 503 is counted too; with FASTCHAT_KEYS_URL, a
server that wants a key, the refused key; with FASTCHAT_FAILING_MODELS, models behind that URL which answer 429, answer
500 and break off, what the client makes of them.
"""

import asyncio
import os
import re
import sys
import urllib.request

import openai

model = sys.argv[1] if len(sys.argv) > 1 else "chatglm2-6b"
base_url = os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1")
messages = [{"role": "user", "content": "Hello!"}]


def requests_counted(url: str) -> float:
    """How many chat completions the server has answered, by whatever status."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=30) as answer:
        text = answer.read().decode()
    lines = re.findall(r"^fastchat_http_requests_total\{[^}]*chat/completions[^}]*\} (\S+)", text, re.MULTILINE)
    return sum(map(float, lines))


def expect(error_class: type[openai.APIStatusError], code: str | None, url: str, tries: int, **request: object) -> None:
    """The request fails with this class and code, after so many tries as the server counts them."""
    before = requests_counted(url)
    with openai.OpenAI(base_url=url, max_retries=2) as client:
        try:
            client.chat.completions.create(**{"model": model, "messages": messages, **request})
        except error_class as error:
            assert type(error) is error_class, error
            assert error.code == code, error
            assert error.request_id, error
        else:
            raise AssertionError(f"{request} was answered")
    counted = requests_counted(url) - before
    assert counted == tries, f"{code}: {counted} requests, not {tries}"
    print(f"{error_class.__name__:22} {code:26} {tries} tries")


expect(openai.BadRequestError, "invalid_value", base_url, 1, temperature=9)
expect(openai.BadRequestError, "context_length_exceeded", base_url, 1, max_tokens=10_000_000)
expect(openai.BadRequestError, "unsupported_parameter", base_url, 1, web_search_options={})
expect(openai.NotFoundError, "model_not_found", base_url, 1, model="nobody-serves-this")
try:
    openai.OpenAI(base_url=base_url).models.retrieve("nobody-serves-this")
except openai.NotFoundError as error:
    assert error.code == "model_not_found", error
else:
    raise AssertionError("an unknown model has a card")

expect(openai.PermissionDeniedError, "origin_not_allowed", base_url, 0, extra_headers={"Origin": "https://a.example"})

busy_url = os.environ.get("FASTCHAT_BUSY_URL")
if busy_url:
    expect(openai.InternalServerError, "no_controller", busy_url, 3)


async def expect_asynchronously(error_class: type[openai.APIStatusError], tries: int, failing: str) -> None:
    """The asynchronous client repeats as often; here a stream that is refused before it begins."""
    before = requests_counted(base_url)
    async with openai.AsyncOpenAI(base_url=base_url, max_retries=tries - 1) as client:
        try:
            await client.chat.completions.create(model=failing, messages=messages, stream=True)
        except error_class as error:
            assert error.request_id, error
        else:
            raise AssertionError(f"{failing} has answered")
    assert requests_counted(base_url) - before == tries


if "FASTCHAT_FAILING_MODELS" in os.environ:
    too_many, broken, half = os.environ["FASTCHAT_FAILING_MODELS"].split(",")
    expect(openai.RateLimitError, "failed_429", base_url, 3, model=too_many)
    expect(openai.InternalServerError, "failed_500", base_url, 3, model=broken)
    asyncio.run(expect_asynchronously(openai.RateLimitError, 2, too_many))
    asyncio.run(expect_asynchronously(openai.InternalServerError, 1, broken))
    stream = openai.OpenAI(base_url=base_url).chat.completions.create(model=half, messages=messages, stream=True)
    assert next(stream).choices[0].delta.content == "Hel"
    try:
        next(stream)
    except openai.APIError as error:
        assert error.code == "bad_worker_answer", error
    else:
        raise AssertionError("half an answer ended like a whole one")
keys_url = os.environ.get("FASTCHAT_KEYS_URL")
if keys_url:
    try:
        openai.OpenAI(base_url=keys_url, api_key="wrong").models.list()
    except openai.AuthenticationError as error:
        assert error.code == "invalid_api_key", error
    else:
        raise AssertionError("a wrong key was accepted")
try:
    openai.OpenAI(base_url="http://127.0.0.1:9/v1", max_retries=0).models.list()
except openai.APIConnectionError as error:
    assert not isinstance(error, openai.APITimeoutError), error
else:
    raise AssertionError("nobody answered")
try:
    openai.OpenAI(base_url=base_url, max_retries=0, timeout=0.001).chat.completions.create(
        model=model, messages=messages
    )
except openai.APITimeoutError:
    pass
else:
    raise AssertionError("a thousandth of a second was enough")
print("openai", openai.__version__, "sees every error")
