"""Answers over a scripted engine: a stream and a whole answer say the same, in the shapes that clients expect."""

import asyncio
import math
import re
from contextlib import aclosing

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchat.api.embeddings import prepare_embeddings
from fastchat.api.request_context import RequestContext
from fastchat.engine.events import FinishReason, SequenceEvent
from fastchat.errors import EngineError, InvalidRequestError
from fastchat.gateway.resumption import num_emitted_ids, resume_body
from tests.api.scripted import (
    EMBEDDING_SIZE,
    EOS,
    PIECES,
    USER,
    ByteTokenizer,
    LineFormat,
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
ANSWER_IDS = st.lists(st.sampled_from([*b"abst \n", *PIECES, *"é你🙂".encode()]), min_size=1, max_size=14)
STOPS = st.lists(st.sampled_from(["stop", "top!", "ab", "b ", "\n", "你", "  "]), max_size=3, unique=True)
TAG_LINE = re.compile(rb"^: \d+ (?:prompt|end|\d+) [\d,]*\n", re.MULTILINE)
TAG = re.compile(rb": (\d+) (prompt|end|\d+) ((?:\d+(?:,\d+)*)?)")


def different_answers(ids):
    """Choices get the same ids, each beginning one further."""
    return lambda request: ids[request.sampling.choice % len(ids) :] or ids


def tags(raw_events):
    """What the tags say: prompt ids and answer ids of each choice. Checks the grammar of every event."""
    prompts, emitted = {}, {}
    for event in raw_events:
        *lines, data = event.split(b"\n")
        assert data.startswith(b"data: ")
        if not lines:
            assert b'"choices":[]' in data or data == b"data: [DONE]"
            continue
        matches = [TAG.fullmatch(line) for line in lines]
        kinds = [match[2] for match in matches]
        assert kinds[-1:] == [b"end"] if b'"finish_reason":"' in data else b"end" not in kinds
        for match in matches:
            choice, ids = int(match[1]), [int(part) for part in match[3].split(b",") if part]
            if match[2] == b"prompt":
                assert choice not in prompts
                assert choice not in emitted
                prompts[choice] = ids
            elif match[2] != b"end":
                assert int(match[2]) == len(emitted.setdefault(choice, []))
                emitted[choice] += ids
            assert b'"index":%d' % choice in data
    return prompts, emitted


@settings(max_examples=60)
@given(ANSWER_IDS, STOPS, st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_joined_deltas_are_the_whole_answer(ids, stops, group_size, interval, is_chat, strips):
    """Byte for byte, for three choices, with stop strings, cut characters and any grouping of ids."""
    document = {**(CHAT if is_chat else {"prompt": "é"}), "n": 3, "stop": stops, "max_tokens": 10}

    async def run():
        chat_format = LineFormat(strips_leading_space=strips)
        engine = ScriptedEngine(different_answers([*ids, EOS]), group_size=group_size)
        models = served(engine, chat_format=chat_format, stream_interval=interval)
        raw, full = await events(models, document, wants_tags=True), await whole(models, document)
        assert not engine.open_sequences
        return raw, full

    raw, full = asyncio.run(run())
    texts = joined(raw)
    assert texts == {choice["index"]: text_of(choice) for choice in full["choices"]}
    assert not any(stop in text for stop in stops for text in texts.values())
    if is_chat and strips:
        assert all(text == text.lstrip() for text in texts.values())
    prompts, emitted = tags(raw)
    assert sorted(prompts) == sorted(emitted) == [0, 1, 2]
    assert sum(map(len, emitted.values())) == full["usage"]["completion_tokens"]


@settings(max_examples=60)
@given(ANSWER_IDS, STOPS, st.integers(1, 12), st.booleans())
def test_text_is_that_of_the_ids_up_to_the_first_stop_string(ids, stops, max_tokens, strips):
    """The whole answer against the rule, written down in the simplest way."""

    async def run():
        models = served(ScriptedEngine(lambda _: [*ids, EOS]), chat_format=LineFormat(strips_leading_space=strips))
        return await whole(models, {**CHAT, "stop": stops, "max_tokens": max_tokens})

    text = ByteTokenizer().decode([*ids, EOS][:max_tokens])
    text = text.lstrip() if strips else text
    cuts = [(text.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    if cuts:
        end, size, stop = min(cuts)
        text = text[: end + size]
    choice = asyncio.run(run())["choices"][0]
    assert text_of(choice) == text
    assert choice["stop_reason"] == (stop if cuts else None)
    assert choice["finish_reason"] == ("stop" if cuts or max_tokens > len(ids) else "length")


def test_stop_string_aborts_its_own_sequence_at_once():
    """The engine does not know stop strings: the sequence is ended here while the other choices go on."""

    async def run():
        engine = ScriptedEngine(lambda request: [*(b"a." if request.sampling.choice == 0 else b""), *b"bcdefgh", EOS])
        made = await answer(served(engine), {**CHAT, "n": 2, "stop": ".", "stream": True})
        async with made.running():
            async for item in made.events():
                if b'"stop_reason":"."' in item:
                    assert {name[-2:] for name in engine.open_sequences} == {"-1"}
                    return
        raise AssertionError("the first choice did not end")

    asyncio.run(run())


@settings(max_examples=80)
@given(ANSWER_IDS, STOPS, st.integers(1, 4), st.booleans(), st.booleans(), st.data())
def test_resumed_answer_continues_exactly(ids, stops, group_size, is_chat, strips, data):
    """Cut behind any event, also within a character or a half-matched stop string: both parts make the whole text,
    and each choice ends once.
    """
    document = {**(CHAT if is_chat else {"prompt": "é", "echo": data.draw(st.booleans())}), "n": 2, "max_tokens": 10}
    document |= {"stop": stops, "stream_options": {"include_usage": True}}

    async def run():
        chat_format = LineFormat(strips_leading_space=strips)
        engine = ScriptedEngine(different_answers([*ids, EOS]), group_size=group_size)
        models = served(engine, chat_format=chat_format)
        raw = await events(models, document, wants_tags=True)
        cut = data.draw(st.integers(1, len(raw) - 2))
        lines = b"".join(line + b"\n" for event in raw[:cut] for line in event.split(b"\n")[:-1])
        resumed = orjson.loads(resume_body(orjson.dumps(document), lines))
        rest = await events(models, resumed, wants_tags=True, is_resume=True)
        assert not engine.open_sequences
        return raw, cut, rest

    raw, cut, rest = asyncio.run(run())
    first = joined([*raw[:cut], b"data: [DONE]"])
    both = {choice: first.get(choice, "") + joined(rest).get(choice, "") for choice in range(2)}
    assert both == joined(raw)
    both = [*raw[:cut], *rest]
    endings = [c["index"] for chunk in chunks(both) for c in chunk["choices"] if c["finish_reason"]]
    assert sorted(endings) == [0, 1]
    assert chunks(rest)[-1]["usage"]["completion_tokens"] == chunks(raw)[-1]["usage"]["completion_tokens"]
    roles = [c["index"] for chunk in chunks(rest) for c in chunk["choices"] if c.get("delta", {}).get("role")]
    assert not set(roles) & set(tags(raw[:cut])[0])


def test_a_resumed_answer_does_not_wait_for_log_probabilities_that_were_sent():
    """Those of the prompt went out before the cut; what is new comes as it is computed, not all at the end."""
    document = {"prompt": "ab", "echo": True, "logprobs": 0, "max_tokens": 8}

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"abcdefgh"]))
        raw = await events(models, document, wants_tags=True)
        lines = b"".join(line + b"\n" for event in raw[:3] for line in event.split(b"\n")[:-1])
        resumed = orjson.loads(resume_body(orjson.dumps(document), lines))
        return raw, await events(models, resumed, wants_tags=True, is_resume=True)

    raw, rest = asyncio.run(run())
    assert rest == raw[3:]


def test_what_the_record_of_a_worker_that_shut_down_has_is_not_counted_again():
    """Both records together are what the undisturbed answer costs."""
    document = {**CHAT, "n": 2, "max_tokens": 6, "stream": True}
    records = []

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"abcdef"]))
        await events(models, document, records=records)
        made = await answer(models, document, wants_tags=True, records=records)
        raw = b""
        async with made.running(), aclosing(made.events()) as items:
            async for item in items:
                raw += item
                if num_emitted_ids(b"".join(TAG_LINE.findall(raw))) >= 4:
                    break
        lines = b"".join(TAG_LINE.findall(raw))
        resumed = orjson.loads(resume_body(orjson.dumps(document), lines))
        context = {"is_resume": True, "num_counted_tokens": num_emitted_ids(lines)}
        await events(models, resumed, records=records, **context)

    asyncio.run(run())
    assert [record.num_awaited_tokens for record in records] == [10, 2, 6]  # not each choice's first
    undisturbed, stopped, resumed = (record.usage for record in records)
    assert 0 < stopped.num_generated_tokens < undisturbed.num_generated_tokens
    assert stopped.num_prompt_tokens + resumed.num_prompt_tokens == undisturbed.num_prompt_tokens
    both = stopped.num_generated_tokens + resumed.num_generated_tokens
    assert both == undisturbed.num_generated_tokens


def test_resume_needs_the_header():
    """Without it the field is unknown, as any other; with it every choice has its place."""

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"abc", EOS]))
        resume = {"prompt_token_ids": [[1]], "emitted_token_ids": [[*b"a"]]}
        made = await answer(models, {**CHAT, "resume": resume})
        assert made.ignored.names == ("resume",)
        for broken in (5, {}, {"prompt_token_ids": [], "emitted_token_ids": []}):
            with pytest.raises(InvalidRequestError, match="resume"):
                await answer(models, {**CHAT, "resume": broken}, is_resume=True)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("stop", "text"), [("\n", "hi "), (" \nhi", "hi "), ("i ", "h"), (["\n", " "], "hi"), ("  ", "hi ")], ids=repr
)
def test_stop_strings_are_looked_for_in_the_text_that_the_client_gets(stop, text):
    """White space that is dropped stops nothing: ChatGLM3 begins every answer with a line break."""

    async def run():
        models = served(
            ScriptedEngine(lambda _: [262, *b" \nhi ", EOS]), chat_format=LineFormat(strips_leading_space=True)
        )
        document = {**CHAT, "stop": stop}
        return text_of((await whole(models, document))["choices"][0]), joined(await events(models, document))

    assert asyncio.run(run()) == (text, {0: text})


@pytest.mark.parametrize("strips", [True, False])
def test_leading_space_is_stripped_for_formats_that_ask_for_it(strips):
    """ChatGLM's answers begin with a space that is none of theirs; completions keep theirs."""

    async def run():
        models = served(
            ScriptedEngine(lambda _: [262, *b" \nhi ", EOS]), chat_format=LineFormat(strips_leading_space=strips)
        )
        chat, completion = await whole(models, CHAT), await whole(models, {"prompt": "x"})
        assert text_of(chat["choices"][0]) == ("hi " if strips else "   \nhi ")
        assert text_of(completion["choices"][0]) == "   \nhi "

    asyncio.run(run())


@pytest.mark.parametrize(
    ("document", "text", "reason", "stop_reason", "num_tokens"),
    [
        ({}, "stop! ab", "stop", None, 8),
        ({"max_tokens": 2}, "stop!", "length", None, 2),
        ({"stop": "top"}, "s", "stop", "top", 2),
        ({"stop": ["p! a", "zzz"]}, "sto", "stop", "p! a", 4),
        ({"stop": "top", "include_stop_str_in_output": True}, "stop", "stop", "top", 2),
        ({"stop": "sto", "min_tokens": 3}, "stop! ab", "stop", None, 8),
        ({"stop_token_ids": [32]}, "stop!", "stop", 32, 3),
        ({"ignore_eos": True, "max_tokens": 8}, "stop! ab", "length", None, 8),
        (
            {"ignore_eos": True, "max_tokens": 9, "skip_special_tokens": False},
            "stop! ab<|user|></s>x",
            "length",
            None,
            8,
        ),
        ({"skip_special_tokens": False, "stop_token_ids": [], "stop": None}, "stop! ab", "stop", None, 6),
    ],
    ids=str,
)
def test_endings(document, text, reason, stop_reason, num_tokens):
    """Why an answer ended, its exact text, and how many ids that took, the ending one included."""
    is_special = document.get("ignore_eos") and document.get("max_tokens") == 9
    script = [260, 261, *b" ab", USER, EOS, *b"x"] if is_special else [260, 261, *b" ab", 279, 279, EOS, *b"x"]
    if "skip_special_tokens" in document and not is_special:
        script = [260, 261, *b" ab", USER, EOS]

    async def run():
        models = served(ScriptedEngine(lambda _: script))
        return await whole(models, {**CHAT, **document})

    full = asyncio.run(run())
    choice = full["choices"][0]
    assert (text_of(choice), choice["finish_reason"]) == (text, reason)
    assert choice["stop_reason"] == stop_reason
    assert full["usage"]["completion_tokens"] == num_tokens


def test_template_stop_strings_count_unless_eos_is_ignored():
    """They end an answer as the template's ids do."""

    async def run():
        models = served(ScriptedEngine(lambda _: [*b"a<end>b", EOS]), chat_format=LineFormat(stop_strings=("<end>",)))
        assert text_of((await whole(models, CHAT))["choices"][0]) == "a"
        full = await whole(models, {**CHAT, "ignore_eos": True, "max_tokens": 7})
        assert text_of(full["choices"][0]) == "a<end>b"

    asyncio.run(run())


@pytest.mark.parametrize(("dimensions", "is_refused"), [(EMBEDDING_SIZE, False), (2, True), (EMBEDDING_SIZE * 2, True)])
def test_dimensions_are_checked_before_anything_is_computed(dimensions, is_refused):
    """Nobody pays for vectors that will be refused."""
    engine = ScriptedEngine(lambda _: ())
    document = {"model": "toy", "input": ["a", "b"], "dimensions": dimensions}
    prepared = prepare_embeddings(served(engine), document, RequestContext("r1", 1), lambda _: None)
    if is_refused:
        with pytest.raises(InvalidRequestError, match=f"must be {EMBEDDING_SIZE}") as caught:
            asyncio.run(prepared)
        assert caught.value.param == "dimensions"
    else:
        asyncio.run(prepared)
    assert engine.requests == []


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_vector_that_is_not_of_numbers_is_our_fault(number):
    """JSON has no word for it; a client would store nulls."""

    async def run():
        engine = ScriptedEngine(lambda _: ())
        engine.is_paused = True
        document = {"model": "toy", "input": "a"}
        made = await prepare_embeddings(served(engine), document, RequestContext("r1", 1), lambda _: None)
        answered = asyncio.get_running_loop().create_task(made.whole())
        while not engine.requests:
            await asyncio.sleep(0)
        vector = (0.5, number, 0.5, 0.5)
        sequence_id = engine.requests[0].sequence_id
        engine.give(SequenceEvent(sequence_id, finish_reason=FinishReason.STOP, embedding=vector))
        with pytest.raises(EngineError, match="not of numbers"):
            await answered

    asyncio.run(run())
