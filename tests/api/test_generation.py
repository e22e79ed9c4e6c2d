"""A request among others: its limits, its seeds, its end, and what it cost."""

import asyncio
import threading

import pytest

from fastchat.engine.events import FinishReason, SequenceEvent
from fastchat.errors import ContextLengthError, EngineError, InvalidRequestError, ModelNotFoundError, UnavailableError
from tests.api.scripted import (
    EOS,
    ByteTokenizer,
    LineFormat,
    ScriptedEngine,
    answer,
    served,
    whole,
)

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def test_prompt_and_answer_must_fit():
    """An explicit length that does not fit is refused with both counts; the default of chat is what is left."""

    async def run():
        engine = ScriptedEngine(lambda _: [*b"hi", EOS])
        models = served(engine)
        with pytest.raises(ContextLengthError) as caught:
            await answer(models, {**CHAT, "max_tokens": 183})
        assert (caught.value.num_prompt_tokens, caught.value.max_tokens, caught.value.max_context) == (18, 183, 200)
        with pytest.raises(ContextLengthError):
            await answer(models, {"prompt": "x" * 200})
        with pytest.raises(InvalidRequestError, match="min_tokens"):
            await answer(models, {**CHAT, "max_tokens": 5, "min_tokens": 6})
        await whole(models, CHAT)
        await whole(models, {"prompt": "x"})
        await whole(models, {"prompt": "x" * 190})
        assert [request.sampling.max_tokens for request in engine.requests] == [182, 16, 10]

    asyncio.run(run())


class CountingTokenizer(ByteTokenizer):
    """How often it was asked for ids."""

    num_asked = 0

    def encode(self, text):
        self.num_asked += 1
        return super().encode(text)


class NotingFormat(LineFormat):
    """On which thread it was asked."""

    threads: tuple[threading.Thread, ...] = ()

    def render(self, messages, **options):
        self.threads += (threading.current_thread(),)
        return super().render(messages[:1], **options)


@pytest.mark.parametrize(
    ("messages", "is_large"),
    [
        ([{"role": "user", "content": "hi"}] * 3, False),
        ([{"role": "user", "content": ""}] * 1000, True),
        ([{"role": "user", "content": "", "metadata": "x" * 500}] * 5, True),
        ([{"role": "user", "content": "", "name": "x" * 500}] * 5, True),
        ([{"role": "system", "content": "", "tools": [{"name": "x"}]}], True),
    ],
    ids=["small", "many", "metadata", "names", "tools"],
)
def test_what_is_large_is_rendered_beside_the_streams(messages, is_large):
    """Whatever makes a conversation large: tools of a megabyte would hold up every stream otherwise."""
    chat_format = NotingFormat()
    asyncio.run(answer(served(ScriptedEngine(lambda _: [EOS]), chat_format=chat_format), {"messages": messages}))
    assert [thread is not threading.main_thread() for thread in chat_format.threads] == [is_large]


@pytest.mark.parametrize(("num_characters", "num_asked"), [(10_000_000, 0), (801, 0), (800, 1)])
def test_a_text_that_cannot_fit_is_refused_by_its_length(num_characters, num_asked):
    """200 tokens of at most 4 characters have room for 800; only what is longer is not tokenized."""

    async def run():
        tokenizer = CountingTokenizer()
        models = served(ScriptedEngine(lambda _: [EOS]), tokenizer=tokenizer)
        with pytest.raises(ContextLengthError) as caught:
            await answer(models, {"prompt": ["x", "x" * num_characters]})
        assert caught.value.param == "prompt"
        assert tokenizer.num_asked == 2 * num_asked
        if not num_asked:
            assert f"at least {-(-num_characters // 4)} tokens" in caught.value.message
            assert "maximum context length is 200" in caught.value.message

    asyncio.run(run())


def test_ids_outside_the_vocabulary_are_refused():
    """In a prompt, among stop ids, in logit_bias."""

    async def run():
        models = served(ScriptedEngine(lambda _: [EOS]))
        for body in (
            {"prompt": [280]},
            {"prompt": [-1]},
            {"prompt": "x", "stop_token_ids": [280]},
            {"prompt": "x", "logit_bias": {"280": 1}},
        ):
            with pytest.raises(InvalidRequestError, match=r"280|-1"):
                await answer(models, body)
        with pytest.raises(ModelNotFoundError, match="toy"):
            await answer(models, {"prompt": "x", "model": "other"})

    asyncio.run(run())


def test_seeds_come_from_client_then_worker_then_api_server():
    """And each choice of a prompt has its own number, whatever the other prompts."""

    async def run():
        engine = ScriptedEngine(lambda _: [EOS])
        await whole(served(engine), {"prompt": "x", "seed": -5}, seed=7)
        await whole(served(engine), {"prompt": "x"}, seed=7)
        await whole(served(engine, default_seed=3), {"prompt": "x"}, seed=7)
        await whole(served(engine), {"prompt": ["x", "y"], "n": 2}, seed=7)
        assert [request.sampling.seed for request in engine.requests] == [-5, 7, 3, 7, 7, 7, 7]
        assert [request.sampling.choice for request in engine.requests[3:]] == [0, 1, 0, 1]
        await whole(served(engine), {"prompt": "x"})
        await whole(served(engine), {"prompt": "x"})
        assert engine.requests[-1].sampling.seed != engine.requests[-2].sampling.seed

    asyncio.run(run())


def test_tenants_and_salts_separate_prefix_caches():
    """A client's cache_salt divides its own tenant's cache and cannot reach into another's."""

    async def run():
        engine = ScriptedEngine(lambda _: [EOS])
        await whole(served(engine), {"prompt": "x"}, tenant="t")
        await whole(served(engine), {"prompt": "x", "cache_salt": "s"}, tenant="t")
        await whole(served(engine), {"prompt": "x", "cache_salt": "t"})
        assert len({request.cache_salt for request in engine.requests}) == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("document", "reason", "num_generated"),
    [({}, "stop", 6), ({"max_tokens": 2}, "length", 4), ({"stop": "b"}, "stop", 4)],
    ids=str,
)
def test_final_record_is_exact(document, reason, num_generated):
    """One record for a request, with the counts that its client was told."""

    async def run():
        records = []
        models = served(ScriptedEngine(lambda _: [*b"ab", EOS]))
        full = await whole(models, {**CHAT, "n": 2, **document}, records=records, tenant="t")
        return full["usage"], records

    usage, (record,) = asyncio.run(run())
    assert (record.reason, record.usage.num_generated_tokens) == (reason, num_generated)
    assert (usage["completion_tokens"], usage["prompt_tokens"]) == (num_generated, record.usage.num_prompt_tokens)
    assert (record.request_id, record.tenant, record.model, record.usage.num_cached_tokens) == ("r1", "t", "toy", 3)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_leaving_early_aborts_every_sequence(num_choices):
    """Whoever reads the stream is cancelled: nothing runs on, and the record says abort with what was generated."""

    async def run():
        records = []
        engine = ScriptedEngine(lambda _: [*b"abcdef", EOS])
        made = await answer(served(engine), {**CHAT, "n": num_choices, "stream": True}, records=records)

        async def read(has_begun):
            async with made.running():
                async for item in made.events():
                    if b'"content":"a"' in item:
                        engine.is_paused = True
                        has_begun.set()

        has_begun = asyncio.Event()
        reader = asyncio.create_task(read(has_begun))
        await has_begun.wait()
        assert len(engine.open_sequences) == num_choices
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert not engine.open_sequences
        assert [record.reason for record in records] == ["abort"]
        assert records[0].usage.num_generated_tokens >= num_choices

    asyncio.run(run())


@pytest.mark.parametrize("num_choices", [1, 3])
@pytest.mark.parametrize(
    ("kind", "error"),
    [("died", EngineError), (FinishReason.ERROR, EngineError), (FinishReason.ABORT, UnavailableError)],
)
def test_one_failing_choice_ends_the_request(num_choices, kind, error):
    """The client is told, the other choices are aborted, the record says error."""

    async def run():
        records = []
        engine = ScriptedEngine(lambda _: [*b"abcdef", EOS])
        engine.is_paused = True
        made = await answer(served(engine), {**CHAT, "n": num_choices, "stream": True}, records=records)

        async def read():
            async with made.running():
                if kind == "died":
                    engine.fail(EngineError("the engine died"))
                else:
                    sequence_id = engine.requests[-1].sequence_id
                    engine.give(SequenceEvent(sequence_id, finish_reason=kind, error="bad numbers"))
                return [item async for item in made.events()]

        with pytest.raises(error):
            await read()
        assert not engine.open_sequences
        assert [record.reason for record in records] == ["error"]

    asyncio.run(run())


def test_deadline_ends_the_request():
    """Nobody waits any more: the answer ends with a 503's error and its sequences are aborted."""

    async def run():
        records = []
        engine = ScriptedEngine(lambda _: [*b"ab"])
        engine.is_paused = True
        made = await answer(served(engine), CHAT, records=records, deadline_s=0.01)
        with pytest.raises(UnavailableError) as caught:
            async with made.running():
                await made.whole()
        assert caught.value.code == "deadline_exceeded"
        assert not engine.open_sequences
        assert [record.reason for record in records] == ["error"]

    asyncio.run(run())
