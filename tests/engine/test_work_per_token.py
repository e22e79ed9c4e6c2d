"""Nothing is quadratic in the length of an answer: a late token costs what an early one did."""

import sys
from collections.abc import Callable

from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from tests.engine.conftest import make_engine

NUM_TOKENS = 1000


def num_calls(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, are called while `action` runs."""
    count = 0

    def note(_frame, event, _argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_late_in_an_answer_makes_no_more_calls_than_an_early_one(glm):
    """Scheduling, blocks, attention, penalties, cut-offs: counted by calls, which no clock disturbs."""
    everything = {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.1,
        "top_p": 0.9,
        "top_k": 50,
        "min_p": 0.01,
        "top_logprobs": 3,
        "logit_bias": ((5, 1.0),),
        "seed": 7,
        "min_tokens": NUM_TOKENS,
        "eos_token_ids": frozenset({2}),
    }
    engine = make_engine(glm, block_size=8, num_blocks=400, max_context=2 * NUM_TOKENS)
    engine.add(SequenceRequest("a", (5, 6, 7), SamplingParams(max_tokens=NUM_TOKENS, **everything)))
    engine.add(SequenceRequest("b", (8, 9), SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0)))
    calls = []
    while engine.has_work:
        begins = len(calls) % 50 == 0
        calls.append(num_calls(engine.step) if begins else engine.step())
    counts = [count for count in calls if isinstance(count, int)]
    early, late = counts[1], counts[-2]
    assert late <= 1.05 * early, counts
