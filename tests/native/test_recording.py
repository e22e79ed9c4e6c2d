"""Recorded computations give what they give when they are computed, with other numbers in their inputs."""

import threading

import pytest
import torch

from fastchat.native import build, products
from fastchat.native.attention import Queries, attend
from fastchat.native.layers import add_rms_norm, add_rows, normalize_heads, rms_norm, rotate, silu_and_multiply
from fastchat.native.low_rank import LowRank, UpPiece, add_low_rank
from fastchat.native.products import multiply, multiply_int4, multiply_int8
from fastchat.native.recording import MAX_OPERATORS, NAMES, RECORD_SIZE, Computed, RecordedCalls, Recording
from tests.native.test_products import draw_int4

pytestmark = pytest.mark.skipif(build.kernels() is None, reason="there are no kernels here")

ROWS, WIDTH, HEADS, HEAD_DIM, BLOCK_SIZE = 3, 64, 4, 16, 4
DTYPE = torch.bfloat16


class Layer:
    """Every kernel that can be recorded, over inputs that a test fills anew."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(1)
        self.rows = self._draw(ROWS, WIDTH)
        self.residual = self._draw(ROWS, WIDTH)
        self.table = self._draw(50, WIDTH)
        self.ids = torch.tensor([3, 4, 5])
        self.lengths = torch.tensor([1, 5, 8])
        self.slots = torch.tensor([0, 12, 23])
        self.norm = self._draw(WIDTH)
        self.weight = self._draw(WIDTH, WIDTH)
        self.int8 = torch.randint(-127, 128, (2 * WIDTH, WIDTH), dtype=torch.int8, generator=self._generator)
        self.int4 = draw_int4(WIDTH, WIDTH, 64)
        self.scales = torch.rand(2 * WIDTH, generator=self._generator)
        self.angles = self._draw(ROWS, HEAD_DIM // 2), self._draw(ROWS, HEAD_DIM // 2)
        self.cache = self._draw(HEADS, 32, HEAD_DIM), self._draw(HEADS, 32, HEAD_DIM)

    def _draw(self, *shape):
        return torch.randn(*shape, generator=self._generator).to(DTYPE)

    def fill(self, seed):
        """Other numbers in the same places."""
        self._generator.manual_seed(seed)
        for tensor in (self.rows, self.residual, *self.angles, *self.cache):
            tensor.copy_(self._draw(*tensor.shape))
        self.ids.copy_(torch.randint(50, (ROWS,), generator=self._generator))
        self.lengths.copy_(torch.randint(1, 8, (ROWS,), generator=self._generator))
        self.slots.copy_(torch.arange(ROWS) * 8 + self.lengths - 1)

    def compute(self):
        tables = torch.arange(2 * ROWS).view(ROWS, 2)
        starts, counts = torch.arange(ROWS), torch.ones(ROWS, dtype=torch.int64)
        queries = Queries(starts, counts, self.lengths, tables, ROWS, self.slots, BLOCK_SIZE)
        embedded = torch.nn.functional.embedding(self.ids, self.table)
        normed = add_rms_norm(embedded + rms_norm(self.rows, self.norm, 1e-6), self.residual, self.norm, 1e-6)
        heads = multiply(normed, self.weight, self.norm).unflatten(-1, (HEADS, HEAD_DIM))
        normalize_heads(heads[:, 1:], self.norm[:HEAD_DIM], 1e-6)
        rotate(heads[:, :2], *self.angles, is_interleaved=False)
        by_head = heads.transpose(0, 1)
        attended = torch.empty_like(heads)
        attend(queries, by_head, (by_head, by_head), self.cache, attended, scaling=0.25, window=5)
        gated = silu_and_multiply(multiply_int8(attended.flatten(1), self.int8, self.scales))
        add_rows(multiply_int4(gated, *self.int4), self.residual)
        return torch.cat([rms_norm(self.residual, self.norm, 1e-5), self.residual])


@torch.inference_mode()
def test_a_replay_computes_what_the_computation_would():
    """All kernels, operators of torch between them, inputs that changed, and results that lie where they lay."""
    layer, twin = Layer(), Layer()
    graph = RecordedCalls().capture(layer.compute)
    assert isinstance(graph, Recording)
    assert torch.equal(graph.replay(), twin.compute())
    place = graph.output.data_ptr()
    for seed in range(5):
        layer.fill(seed)
        twin.fill(seed)
        assert torch.equal(graph.replay(), twin.compute())
        assert all(map(torch.equal, layer.cache, twin.cache))
        assert graph.output.data_ptr() == place


def test_every_kernel_of_a_layer_can_be_recorded():
    """The test above calls all that can be recorded; the longest fits a record."""
    called = set()
    library = build.kernels()

    class Watched:
        def __getattr__(self, name):
            called.add(name)
            return getattr(library, name)

    with torch.inference_mode(), build.calls_go_to(Watched()):
        Layer().compute()
    assert called == set(NAMES)
    assert all(len(getattr(library, name).argtypes) <= RECORD_SIZE for name in NAMES)


@torch.inference_mode()
def test_recordings_share_the_memory_of_what_is_gone():
    """Within one, and with others of nearly the same size; a result is good until another is computed."""
    backend = RecordedCalls()
    weight = torch.randn(1024, 1024)

    def chain(rows):
        for _ in range(20):
            rows = multiply(rows, weight)
        return rows

    inputs = [torch.randn(count, 1024) for count in (6, 7, 8)]
    graphs, results = [], []
    for rows in inputs:
        graphs.append(backend.capture(lambda rows=rows: chain(rows)))
        results.append(graphs[-1].replay().clone())
    for _ in range(2):
        for rows, graph, result in zip(inputs, graphs, results, strict=True):
            assert torch.equal(graph.replay(), result)
            assert torch.equal(result, chain(rows))
    assert sum(map(len, backend._pool._free.values())) <= 3


@torch.inference_mode()
def test_recordings_of_many_sizes_hold_what_the_largest_does():
    """One more takes nothing for good: neither for its result nor for those of torch's operators."""
    backend = RecordedCalls()
    table, weight = torch.randn(50, 1024), torch.randn(1024, 1024)
    ids = torch.arange(40)

    def compute(count):
        return multiply(torch.nn.functional.embedding(ids[:count], table) + 1.0, weight)

    graphs = {}
    for count in range(1, len(ids) + 1):
        graphs[count] = backend.capture(lambda count=count: compute(count))
        assert torch.equal(graphs[count].replay(), compute(count))
    ids.add_(7)
    for count, graph in graphs.items():
        assert torch.equal(graph.replay(), compute(count))
    tensors = [graph.output for graph in graphs.values()]
    tensors += [step.outcome for graph in graphs.values() for step in graph.steps if hasattr(step, "outcome")]
    assert len(tensors) == 3 * len(ids)
    assert len({tensor.data_ptr() for tensor in tensors}) <= 3 * 7  # of each power of two


@torch.inference_mode()
@pytest.mark.parametrize("what", ["item", "list", "number", "strides", "operators", "kernel"])
def test_what_cannot_be_recorded_is_computed_every_time(what):
    rows, down, up = torch.randn(2, 16), torch.randn(4, 16), torch.randn(4, 16)

    def compute():
        result = multiply(rows, down.new_ones(16, 16))
        if what == "item":
            return result * (2 if rows.sum().item() > 0 else 3)
        if what == "list":
            return result * (2 if rows.tolist()[0][0] > 0 else 3)
        if what == "number":
            return result * torch.tensor([2.0])
        if what == "strides":
            return torch.empty_like(result.t()).copy_(result.t())
        if what == "operators":
            for _ in range(MAX_OPERATORS + 1):
                result = result + 1
            return result
        add_low_rank(result, rows, [(0, 2, LowRank(down, (UpPiece(0, 0, up),)))])
        return result

    graph = RecordedCalls().capture(compute)
    assert isinstance(graph, Computed)
    for _ in range(2):
        assert torch.equal(graph.replay(), compute())
        rows.neg_()


@torch.inference_mode()
def test_other_threads_are_not_recorded():
    """Two engines in one process."""
    rows, weight = torch.randn(2, 32), torch.randn(32, 32)
    results = []

    def compute():
        other = threading.Thread(target=lambda: results.append(products.multiply(rows.detach(), weight)))
        other.start()
        other.join()
        return multiply(rows, weight)

    graph = RecordedCalls().capture(compute)
    assert isinstance(graph, Recording)
    (calls,) = graph.steps
    assert len(calls.numbers) == RECORD_SIZE
    assert torch.equal(results[0], graph.replay())


@torch.inference_mode()
def test_an_error_while_recording_is_that_of_the_computation():
    """And the thread's calls go to the kernels again."""

    def compute():
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        RecordedCalls().capture(compute)
    assert build.kernels() is build.loaded_library()
