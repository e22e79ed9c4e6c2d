"""One request, one fault: whatever goes wrong with a sequence, the others do not notice."""

import pytest
import torch

from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from tests.engine.conftest import answer_ids, make_engine, run_all
from tests.engine.tiny_models import VOCAB_SIZE, make_model

POISON = 400
NUM_OTHERS = 12


def model_that_raises(error: Exception):
    """A model whose step fails when the poisoned id is among its tokens."""
    model = make_model("glm")

    def look(_module, inputs):
        if (inputs[0] == POISON).any():
            raise error

    model.get_input_embeddings().register_forward_pre_hook(look)
    return model


def requests() -> list[SequenceRequest]:
    """Greedy, seeded and penalised answers, one of whose prompts has a long way to go."""
    options = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "repetition_penalty": 1.3, "frequency_penalty": 0.7},
        {"temperature": 0.0, "prompt_logprobs": 1, "top_logprobs": 2},
    ]
    return [
        SequenceRequest(
            str(index),
            tuple(3 + (index * 31 + place * 7) % 300 for place in range(10 + 5 * index)),
            SamplingParams(max_tokens=12, seed=index, **options[index % len(options)]),
        )
        for index in range(NUM_OTHERS)
    ]


def poisoned(name: str, prompt_length: int, **options) -> SequenceRequest:
    prompt = (*range(3, 3 + prompt_length), POISON)
    return SequenceRequest(name, prompt, SamplingParams(max_tokens=12, temperature=0.0), **options)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), torch.OutOfMemoryError("no memory"), MemoryError()])
def test_a_step_that_fails_ends_only_the_sequence_to_blame(error):
    """The others' events are those of a run without it; nothing of the failed one stays."""
    model = model_that_raises(error)
    expected = run_all(make_engine(model, max_batch_tokens=64), requests())
    engine = make_engine(model, max_batch_tokens=64)
    events = run_all(engine, [poisoned("short", 5), *requests(), poisoned("long", 100)])
    for name in ("short", "long"):
        assert events[name][-1].finish_reason is FinishReason.ERROR
        assert answer_ids(events[name]) == []
    for request in requests():
        own, alone = events[request.sequence_id], expected[request.sequence_id]
        assert answer_ids(own) == answer_ids(alone)
        assert [entry.token_id for event in own for entry in event.logprobs] == [
            entry.token_id for event in alone for entry in event.logprobs
        ]
        assert len(own[0].prompt_logprobs) == len(alone[0].prompt_logprobs)


def test_a_fault_in_sampling_ends_only_its_sequence():
    """The others' penalties go on from what they have said."""
    sampling = SamplingParams(max_tokens=20, temperature=0.0, frequency_penalty=1.5, presence_penalty=0.5)
    # An id behind the vocabulary gets through to the sampler only where no client checked it.
    broken = SequenceRequest("b", (8, 9), SamplingParams(max_tokens=20, logit_bias=((VOCAB_SIZE, 1.0),)))
    model = make_model("glm")
    (alone, beside) = (
        run_all(make_engine(model), [SequenceRequest("a", (5, 6, 7), sampling), *others]) for others in ([], [broken])
    )
    assert beside["a"] == alone["a"]
    assert beside["b"][-1].finish_reason is FinishReason.ERROR


def test_a_device_that_is_broken_ends_the_engine():
    """After such an error nothing can be computed any more: an engine that went on would fail every request."""
    engine = make_engine(model_that_raises(torch.AcceleratorError("unspecified launch failure")))
    engine.add(poisoned("a", 5))
    with pytest.raises(torch.AcceleratorError):
        engine.step()
