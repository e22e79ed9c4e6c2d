"""Nothing is quadratic in the length of an answer: ids to text, stop strings, events."""

import asyncio
import time

import pytest

from tests.api.scripted import EOS, ScriptedEngine, events, served, whole

CHAT = {"messages": [{"role": "user", "content": "hi"}], "stop": ["stop here", "ab stop"], "logprobs": True}
COMPLETION = {"prompt": "x", "stop": ["stop here"], "logprobs": 2, "echo": True}


def seconds(document, num_tokens, *, stream):
    """Of the processor, the better of three."""
    script = [*"ab sto 你".encode()] * (num_tokens // 10 + 1)

    async def run():
        models = served(ScriptedEngine(lambda _: [*script[:num_tokens], EOS], max_context=2 * num_tokens + 100))
        asked = {**document, "max_tokens": num_tokens}
        began_at = time.process_time()
        await (events(models, asked) if stream else whole(models, asked))
        return time.process_time() - began_at

    return min(asyncio.run(run()) for _ in range(3))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("document", [CHAT, COMPLETION], ids=["chat", "completion"])
def test_an_answer_ten_times_as_long_takes_about_ten_times_as_long(document, stream):
    """What is quadratic would take a hundred times as long."""
    short, long = (seconds(document, num_tokens, stream=stream) for num_tokens in (500, 5000))
    assert long < 30 * short


def test_events_do_not_grow_with_the_answer():
    """A late event has as many bytes as an early one: each brings only what is new."""

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"x" * 2000, EOS], max_context=4000))
        return await events(models, {**CHAT, "max_tokens": 2000, "logprobs": False})

    sizes = [len(event) for event in asyncio.run(run())]
    assert max(sizes[50:100]) == max(sizes[-100:-2])
