"""What a step costs, counted and not timed: operator calls, new tensors, steps."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.lean import make_lean
from fastchat.native import attention as native_attention
from tests.engine.conftest import make_engine, run_all
from tests.engine.tiny_models import SHAPE, make_model

NUM_LAYERS = SHAPE["num_hidden_layers"]
ALLOCATIONS = {"new_empty", "empty", "empty_like", "new_zeros", "zeros", "clone", "_to_copy", "cat", "index"}

pytestmark = pytest.mark.skipif(
    not native_attention.is_available(torch.bfloat16), reason="without the kernels torch's operators do the work"
)


class Calls(TorchDispatchMode):
    """Operator calls while it is entered, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def lean():
    model = make_model("qwen2", torch.bfloat16)
    make_lean(model)
    return model


def streams(num, max_tokens=8, **sampling):
    """Prompts of which nothing repeats, so that nothing is drafted."""
    return [
        SequenceRequest(
            str(index), tuple(range(3 + index, 13 + index)), SamplingParams(max_tokens=max_tokens, **sampling)
        )
        for index in range(num)
    ]


def calls_of_a_decode_step(model, num, **sampling) -> Counter:
    engine = make_engine(model, speculation=False)
    for request in streams(num, **sampling):
        engine.add(request)
    engine.step()
    engine.step()  # which is recorded
    with Calls() as calls:
        assert len(engine.step()) == num
    return calls.counts


def test_a_decode_step_makes_few_operator_calls(lean):
    """None for a layer and 60 for all else; a budget that only goes down."""
    assert calls_of_a_decode_step(lean, 1, temperature=0.0).total() <= 60


def test_operator_calls_do_not_grow_with_the_streams(lean):
    """Eight greedy streams are one batch: the same calls as one stream, within a few."""
    one, eight = (calls_of_a_decode_step(lean, num, temperature=0.0).total() for num in (1, 8))
    assert eight <= one + 4


def test_a_decode_step_makes_few_tensors(lean):
    """None for a layer and 8 for all else, whatever the number of streams."""
    for num in (1, 8):
        counts = calls_of_a_decode_step(lean, num, temperature=0.0)
        assert sum(counts[name] for name in ALLOCATIONS) <= 8, counts


def test_greedy_choosing_sorts_nothing(lean):
    """Nor does it normalise: one pass finds the most probable token, but for the rest of a width."""
    counts = calls_of_a_decode_step(lean, 4, temperature=0.0)
    assert not counts.keys() & {"sort", "topk", "_softmax", "_log_softmax"}
    assert counts["amax"] <= 2


def test_streams_share_their_steps(lean):
    """Prompts of one budget are one step, and every further token of all streams is one step."""
    engine = make_engine(lean, speculation=False)
    run_all(engine, streams(8, max_tokens=8, temperature=0.0))
    assert engine.stats.num_steps == 8
