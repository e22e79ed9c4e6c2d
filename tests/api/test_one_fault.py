"""One request, one fault: text work that fails in one request is that request's end, and nobody else's."""

import asyncio

import pytest

from fastchat.engine.events import FinishReason, SequenceEvent
from fastchat.errors import EngineError
from tests.api.scripted import (
    ByteTokenizer,
    LineFormat,
    ScriptedEngine,
    answer,
    events,
    joined,
    served,
    whole,
)

NUM_OTHERS = 31
BROKEN_ID = 250
ANSWER = [*b"a long answer, word by word"]


class FaultyTokenizer(ByteTokenizer):
    """Fails for one text and for one id, as a tokenizer with a bug would."""

    def encode(self, text):
        if "broken" in text:
            raise RuntimeError("a bug in the tokenizer")
        return super().encode(text)

    def token_bytes(self, token_id):
        if token_id == BROKEN_ID:
            raise RuntimeError("a bug in the detokenizer")
        return super().token_bytes(token_id)


class FaultyFormat(LineFormat):
    """Fails for one message, as a template with a bug would."""

    def render(self, messages, *, add_generation_prompt=True, **options):
        if "broken" in messages[0].content:
            raise RuntimeError("a bug in the format")
        return super().render(messages, add_generation_prompt=add_generation_prompt, **options)


def script(request):
    """The broken prompt's answer holds the broken id."""
    return [*ANSWER[:3], BROKEN_ID, *ANSWER[3:]] if b"\x01" in bytes(request.prompt_token_ids) else ANSWER


FAULTS = {
    "tokenizing": ({"prompt": "broken"}, RuntimeError),
    "rendering": ({"messages": [{"role": "user", "content": "broken"}]}, RuntimeError),
    "detokenizing": ({"prompt": "\x01"}, RuntimeError),
    "detokenizing for log probabilities": ({"prompt": "\x01", "logprobs": 1}, RuntimeError),
    "computing": ({"prompt": "\x02"}, EngineError),
}


class FailingEngine(ScriptedEngine):
    """Ends the sequence of one prompt with an error, as the engine does after a step that failed."""

    def _step(self, request):
        if 2 in request.prompt_token_ids and request.sequence_id in self.open_sequences:
            self.give(SequenceEvent(request.sequence_id, finish_reason=FinishReason.ERROR, error="a step failed"))
        else:
            super()._step(request)


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_one_request_of_thirty_two(fault, is_stream):
    """31 have the answer that they have without it, nothing stays open, and the failed one has a record of its end."""
    document, error_class = FAULTS[fault]
    document = {"max_tokens": 40, **document}
    ask = events if is_stream else whole
    engine = FailingEngine(script)
    models = served(engine, tokenizer=FaultyTokenizer(), chat_format=FaultyFormat())
    records = []

    async def fail():
        with pytest.raises(error_class):
            await ask(models, document, records=records)

    async def run_all():
        others = (events(models, {"prompt": f"good {number}", "max_tokens": 40}) for number in range(NUM_OTHERS))
        _, *answers = await asyncio.gather(fail(), *others)
        return answers

    assert [joined(each) for each in asyncio.run(run_all())] == [{0: bytes(ANSWER).decode()}] * NUM_OTHERS
    assert engine.open_sequences == set()
    assert engine.num_open == 0
    assert [record.reason for record in records] in ([], ["error"])


def test_the_answer_object_of_a_failed_request_is_not_made():
    """A fault before the sequence is submitted leaves nothing to abort."""
    engine = ScriptedEngine(script)
    models = served(engine, tokenizer=FaultyTokenizer(), chat_format=FaultyFormat())
    with pytest.raises(RuntimeError):
        asyncio.run(answer(models, {"prompt": "broken"}))
    assert engine.requests == []
