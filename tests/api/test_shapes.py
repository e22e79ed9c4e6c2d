"""The JSON of answers, whole and streamed, as the official client reads it."""

import asyncio

import openai.types
import openai.types.chat
import pytest

from tests.api.scripted import (
    EOS,
    ScriptedEngine,
    answer,
    chunks,
    events,
    joined,
    served,
    text_of,
    whole,
)

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_stream_has_the_shape_that_clients_expect():
    """One role chunk first, one ending last, then usage, then [DONE]; constant ids; openai's classes validate all."""
    document = {**CHAT, "n": 2, "stream_options": {"include_usage": True}, "logprobs": True, "top_logprobs": 1}

    async def run():
        models = served(ScriptedEngine(lambda _: [*"hé".encode(), EOS]))
        return await events(models, {**document, "return_token_ids": True})

    raw = asyncio.run(run())
    assert not any(event.startswith(b":") for event in raw)
    assert not any(b'"error"' in event for event in raw)
    stream = chunks(raw)
    for chunk in stream:
        openai.types.chat.ChatCompletionChunk.model_validate(chunk)
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in stream} == {
        ("chatcmpl-r1", 1_700_000_000, "toy")
    }
    for index in range(2):
        own = [c for chunk in stream for c in chunk["choices"] if c["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert own[0]["prompt_token_ids"] == [*b"user:hi\nassistant:"]
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["stop"]
        assert own[-1]["delta"] == {}
        assert [i for choice in own for i in choice.get("token_ids", ())] == [*"hé".encode(), EOS]
        assert sum(len(choice["logprobs"]["content"]) for choice in own if choice["logprobs"]) == 4
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in stream[:-1])


def test_usage_is_absent_from_chunks_unless_asked_for():
    """Old clients index `choices[0]` blindly: every chunk has a choice."""

    async def run():
        return chunks(await events(served(ScriptedEngine(lambda _: [*b"hi", EOS])), CHAT))

    assert all("usage" not in chunk and chunk["choices"] for chunk in asyncio.run(run()))


def test_whole_chat_answer_is_complete():
    """Every field that openai's classes require, with exact counts."""

    async def run():
        models = served(ScriptedEngine(lambda _: [258, *b"\xa0", EOS]))
        document = {**CHAT, "logprobs": True, "top_logprobs": 2, "return_token_ids": True}
        return await whole(models, document)

    full = asyncio.run(run())
    openai.types.chat.ChatCompletion.model_validate(full)
    choice = full["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "你", "refusal": None, "annotations": []}
    assert [place["token"] for place in choice["logprobs"]["content"]] == ["bytes:\\xe4\\xbd", "bytes:\\xa0", "</s>"]
    assert choice["logprobs"]["content"][0]["bytes"] == [0xE4, 0xBD]
    assert choice["token_ids"] == [258, 0xA0, EOS]
    assert choice["prompt_token_ids"] == full["prompt_token_ids"] == [*b"user:hi\nassistant:"]
    assert full["usage"] == {
        "prompt_tokens": 18,
        "completion_tokens": 3,
        "total_tokens": 21,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def test_completions_are_ordered_by_prompt_then_choice():
    """index = prompt * n + choice; a prompt counts once; echo puts it in front, log probabilities too."""

    async def run():
        models = served(ScriptedEngine(lambda request: [*bytes(request.prompt_token_ids), *b"!", EOS]))
        document = {"prompt": ["ab", "c"], "n": 2, "echo": True, "logprobs": 1, "return_token_ids": True}
        return await whole(models, document), await events(models, document)

    full, raw = asyncio.run(run())
    openai.types.Completion.model_validate(full)
    assert [choice["text"] for choice in full["choices"]] == ["abab!", "abab!", "cc!", "cc!"]
    assert joined(raw) == {index: choice["text"] for index, choice in enumerate(full["choices"])}
    assert full["usage"]["prompt_tokens"] == 3
    first = full["choices"][0]
    assert first["logprobs"]["tokens"] == ["a", "b", "a", "b", "!", "</s>"]
    assert first["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert (first["prompt_token_ids"], first["token_ids"]) == ([*b"ab"], [*b"ab!", EOS])
    streamed = [c["logprobs"] for chunk in chunks(raw) for c in chunk["choices"] if c["index"] == 0 and c["logprobs"]]
    assert [token for part in streamed for token in part["tokens"]] == first["logprobs"]["tokens"]
    assert [offset for part in streamed for offset in part["text_offset"]] == first["logprobs"]["text_offset"]


def test_echo_without_an_answer_scores_the_prompt():
    """max_tokens 0 with echo: the prompt's log probabilities and nothing else."""

    async def run():
        return await whole(
            served(ScriptedEngine(lambda _: [])), {"prompt": [*b"ab"], "echo": True, "logprobs": 0, "max_tokens": 0}
        )

    choice = asyncio.run(run())["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("ab", "length")
    assert choice["logprobs"]["tokens"] == ["a", "b"]


@pytest.mark.parametrize(("script", "text"), [([259, EOS], "a你x"), ([EOS], "a\ufffd")])
def test_echo_and_answer_are_the_text_of_all_ids(script, text):
    """Also where the prompt's ids end within a character, which the answer may complete."""
    document = {"prompt": [*b"a", 258], "echo": True, "logprobs": 0}

    async def run():
        models = served(ScriptedEngine(lambda _: script))
        return await whole(models, document), await events(models, document)

    full, raw = asyncio.run(run())
    assert full["choices"][0]["text"] == joined(raw)[0] == text
    assert full["choices"][0]["logprobs"]["text_offset"] == [0, 1, *[1, 3][: len(script)]]


@pytest.mark.parametrize("document", [CHAT, {"prompt": "x"}], ids=["chat", "completion"])
@pytest.mark.parametrize("script", [[EOS], [258]], ids=["nothing", "half a character"])
def test_an_answer_without_text_has_its_ending(document, script):
    """A model that says nothing, or half a character: each choice has one ending, and a stream the whole's text."""

    async def run():
        models = served(ScriptedEngine(lambda _: script))
        asked = {**document, "n": 2, "max_tokens": 1}
        return await whole(models, asked), await events(models, asked)

    full, raw = asyncio.run(run())
    text = "" if script == [EOS] else "\ufffd"
    assert [text_of(choice) for choice in full["choices"]] == [text, text]
    streamed = [choice for chunk in chunks(raw) for choice in chunk["choices"]]
    endings = [(choice["index"], choice["finish_reason"]) for choice in streamed if choice["finish_reason"]]
    assert sorted(endings) == [(choice["index"], choice["finish_reason"]) for choice in full["choices"]]
    assert {index: joined(raw).get(index, "") for index in (0, 1)} == {0: text, 1: text}


def test_usage_of_several_prompts_comes_once():
    """Behind the last ending and nowhere else: each prompt counts once, each choice's ids in full."""

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"hi.", EOS]))
        asked = {"prompt": ["ab", "c"], "n": 2, "stop": "."}
        return await whole(models, asked), await events(models, {**asked, "stream_options": {"include_usage": True}})

    full, raw = asyncio.run(run())
    stream = chunks(raw)
    assert [chunk["usage"] for chunk in stream[:-1]] == [None] * (len(stream) - 1)
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"] == full["usage"]
    counts = [full["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    assert counts == [3, 4 * 3, 15]


def test_fields_that_a_prompt_has_no_place_for_are_told():
    """A message's name, where the model's format does not write it, is listed as unknown fields are."""

    async def run(**fields):
        models = served(ScriptedEngine(lambda _: [EOS]))
        made = await answer(models, {"messages": [{"role": "user", "content": "hi", **fields}]})
        return made.ignored.header_value()

    assert asyncio.run(run(name="Ann", tool_call_id="c", metadata="m")) == "messages.name, messages.tool_call_id"
    assert asyncio.run(run(metadata="m")) is None


def test_several_tokens_go_out_in_one_event_when_asked():
    """`--stream-interval 3` gives a third of the events, with the same text."""

    async def run(interval):
        models = served(ScriptedEngine(lambda _: [*b"abcdefghi", EOS]), stream_interval=interval)
        return await events(models, CHAT)

    one, three = asyncio.run(run(1)), asyncio.run(run(3))
    assert joined(one) == joined(three) == {0: "abcdefghi"}
    assert len(one) - len(three) == 6
