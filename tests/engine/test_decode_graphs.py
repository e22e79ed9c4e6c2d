"""Captured decode steps give what uncaptured ones give, while sequences come and go."""

import pytest
import torch

from fastchat.engine.decode_graphs import CudaGraphs, batch_sizes
from fastchat.engine.engine import Engine, EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.execution import Execution
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.lean import make_lean
from fastchat.native import attention as native_attention
from fastchat.native.recording import Recording
from tests.engine.conftest import KV_BYTES_PER_TOKEN, answer_ids, run_all
from tests.engine.recorded_graphs import RecordedGraphs, attend_paged
from tests.engine.tiny_models import make_model

BLOCK_SIZE = 8


def make_engine(model, execution, *, num_blocks=100, max_running=6):
    config = EngineConfig(
        max_context=128,
        kv_cache_bytes=num_blocks * BLOCK_SIZE * KV_BYTES_PER_TOKEN,
        block_size=BLOCK_SIZE,
        max_batch_tokens=24,
        max_running=max_running,
        speculation=False,
    )
    return Engine(model, config, execution=execution)


def requests():
    """More than run at once, of many lengths, one with a question beside the next token."""
    for number in range(9):
        prompt = tuple(10 + (number * 37 + place * 11) % 490 for place in range(1 + number * 7))
        prompt_logprobs = 2 if number == 4 else None
        sampling = SamplingParams(
            temperature=0.0, max_tokens=9 + number % 4 * 5, ignore_eos=True, prompt_logprobs=prompt_logprobs
        )
        yield SequenceRequest(f"{number}", prompt, sampling)


def answers(engine):
    return {name: answer_ids(events) for name, events in run_all(engine, requests()).items()}


@pytest.mark.parametrize("family", ["glm", "mistral"])
@pytest.mark.parametrize("num_blocks", [100, 13])
def test_captured_steps_give_the_same_tokens(family, num_blocks):
    """While sequences come, go, and are preempted; a graph for each padded size, none captured twice."""
    model = make_model(family)
    expected = answers(make_engine(model, None, num_blocks=num_blocks))
    backend = RecordedGraphs()
    engine = make_engine(model, Execution(attend_paged, backend), num_blocks=num_blocks)
    assert answers(engine) == expected
    assert 2 <= len(backend.graphs) <= len(batch_sizes(6))
    assert sum(graph.num_replays for graph in backend.graphs) > engine.stats.num_steps / 3
    assert (engine.stats.num_preemptions > 0) == (num_blocks == 13)
    before = len(backend.graphs)
    assert answers(engine) == expected
    assert len(backend.graphs) == before


@pytest.mark.skipif(not native_attention.is_available(torch.float32), reason="there are no kernels here")
@pytest.mark.parametrize("family", ["glm", "llama", "mistral", "qwen2", "qwen3"])
def test_every_lean_family_is_recorded_on_a_cpu(family):
    """And gives the tokens of operation by operation."""
    model = make_model(family)
    make_lean(model)
    execution = Execution.of(model.device, model.dtype)
    backend = Watched(execution.graphs)
    recorded = answers(make_engine(model, Execution(execution.kernel, backend)))
    assert {type(graph) for graph in backend.graphs} == {Recording}
    assert recorded == answers(make_engine(model, Execution(execution.kernel)))


class Watched:
    """A backend that keeps what it captured."""

    def __init__(self, backend):
        self._backend = backend
        self.sizes = backend.sizes
        self.graphs = []

    def capture(self, compute):
        self.graphs.append(self._backend.capture(compute))
        return self.graphs[-1]


def test_sizes_are_powers_of_two_up_to_all_that_run():
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(256) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("family", ["glm", "mistral"])
def test_cuda_graphs_give_the_same_tokens(family):
    """The real kernels, captured and not."""
    model = make_model(family).to("cuda")
    execution = Execution.of(model.device, model.dtype)
    assert isinstance(execution.graphs, CudaGraphs)
    expected = answers(make_engine(model, Execution(execution.kernel)))
    assert answers(make_engine(model, execution)) == expected
