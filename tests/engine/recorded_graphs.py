"""CUDA graphs without CUDA: what a computation does is recorded once and then done again, without its Python.

As on a device, a replay reads and writes the very tensors of the capture, knows nothing of lists or lengths of later
steps, and gives its result in the same place every time.
"""

from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fastchat.engine.decode_graphs import batch_sizes


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        outcome = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outcome))
        return outcome


@dataclass
class RecordedGraph:
    calls: list
    output: torch.Tensor
    num_replays: int = 0

    def replay(self):
        self.num_replays += 1
        for function, args, kwargs, outcome in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(tree_flatten(outcome)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)
        return self.output


@dataclass
class RecordedGraphs:
    """A `GraphBackend`."""

    graphs: list = field(default_factory=list)

    def sizes(self, max_running):
        return batch_sizes(max_running)

    def capture(self, compute):
        compute()
        with _Recorder() as recorder:
            output = compute()
        self.graphs.append(RecordedGraph(recorder.calls, output))
        return self.graphs[-1]


@torch.library.custom_op("fastchat_tests::attend", mutates_args={"output"})
def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    integers: list[torch.Tensor],
    output: torch.Tensor,
    block_size: int,
    scaling: float,
    window: int,
) -> None:
    """One operator, as a kernel is: it reads its integers when it runs."""
    num_groups = len(query) // len(keys)
    with torch._C.DisableTorchFunction():  # what a kernel reads, the host does not wait for
        starts, counts, lengths, tables = (tensor.tolist() for tensor in integers)
    for start, count, length, table in zip(starts, counts, lengths, tables, strict=True):
        rows = slice(start, start + count)
        places = torch.arange(length)
        slots = torch.tensor(table)[places // block_size] * block_size + places % block_size
        mine, theirs = (tensor[:, slots].repeat_interleave(num_groups, 0) for tensor in (keys, values))
        queries = torch.arange(length - count, length).unsqueeze(1)
        mask = (places <= queries) & (places > queries - window)
        if length == 0:
            output[rows] = 0.0
            continue
        attended = torch.nn.functional.scaled_dot_product_attention(
            query[:, rows], mine, theirs, attn_mask=mask, scale=scaling
        )
        output[rows] = attended.transpose(0, 1)


def attend_paged(inputs, step):
    """Attention over `PagedQueries` alone, for the engine; the spans of a captured step are not there."""
    inputs.keys.index_copy_(1, step.slots, inputs.new_keys)
    inputs.values.index_copy_(1, step.slots, inputs.new_values)
    num_heads, num_tokens, head_dim = inputs.query.shape
    output = inputs.query.new_empty((num_tokens, num_heads, head_dim))
    for queries in step.paged_queries:
        integers = [queries.starts, queries.counts, queries.lengths, queries.tables]
        _attend(
            inputs.query,
            inputs.keys,
            inputs.values,
            integers,
            output,
            queries.block_size,
            inputs.scaling,
            inputs.window or 2**30,
        )
    return output
