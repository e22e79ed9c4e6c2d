"""Where the device runs beside the host: the same tokens as a CPU's choice, and one wait in a step."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.execution import Execution
from fastchat.engine.sampler import Sampler
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.sequence import Sequence
from tests.engine.recorded_graphs import RecordedGraphs, attend_paged

VOCAB_SIZE = 3000
OPTIONS = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 5},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.0, "min_p": 0.1, "presence_penalty": 1.5},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": ((3, 5.0), (7, -100.0))},
    {"temperature": 0.9, "min_tokens": 5, "eos_token_ids": frozenset({2})},
)


def make_sequences(seed):
    return [
        Sequence(SequenceRequest(str(row), (1, 2, 3), SamplingParams(max_tokens=100, seed=seed + row, **options)), row)
        for row, options in enumerate(OPTIONS)
    ]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31), width=st.floats(0.5, 4.0))
def test_all_rows_at_once_choose_what_each_chooses_on_a_cpu(seed, width):
    """Every option; a row without numbers is told and disturbs none."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(OPTIONS), VOCAB_SIZE, generator=generator) * width
    logits[seed % len(OPTIONS), 5] = torch.nan
    expected = Sampler(VOCAB_SIZE).sample(make_sequences(seed), logits)
    found = Sampler(VOCAB_SIZE, waits_once=True).sample(make_sequences(seed), logits)
    assert found == expected
    assert found[seed % len(OPTIONS)].token_id is None


class _HostReads(TorchFunctionMode):
    """What makes a host wait for its device: reading numbers out of a tensor."""

    WAITING = frozenset({"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"})

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, _types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in self.WAITING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


class _ScalarReads(TorchDispatchMode):
    """The same from inside torch: operators that give their caller a number, or a tensor of a size they find out."""

    WAITING = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "bincount", "_unique2"})

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in self.WAITING:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_a_step_waits_for_its_token_ids_and_for_nothing_else(glm):
    """Captured decode steps, and steps with a chunk of a prompt, of sequences with every option."""
    config = EngineConfig(max_context=64, kv_cache_bytes=2**22, block_size=8, max_batch_tokens=24, speculation=False)
    engine = Engine(glm, config, execution=Execution(attend_paged, RecordedGraphs(), waits_once=True))
    for row, options in enumerate(OPTIONS):
        sampling = SamplingParams(max_tokens=12, seed=row, ignore_eos=True, **options)
        engine.add(SequenceRequest(str(row), (1, 2, 3 + row), sampling))
    for _ in range(6):  # penalties count a sequence's tokens once, when it comes; graphs are captured once
        engine.step()
    engine.add(SequenceRequest("late", tuple(range(10, 50)), SamplingParams(max_tokens=4, temperature=0.0)))
    num_steps = 0
    while engine.has_work:
        with _HostReads() as reads, _ScalarReads() as scalars:
            events = engine.step()
        assert reads.names == (["tolist"] if events else [])
        assert scalars.names == []
        num_steps += 1
    assert num_steps > 5
