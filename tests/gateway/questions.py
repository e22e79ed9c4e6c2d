"""What the tests of the relay ask, and how they read what comes back."""

import orjson

CHAT = "/v1/chat/completions"
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "你好"}]}


def data_of(body):
    return [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]


def error_of(body):
    return orjson.loads(body)["error"]
