"""Decode steps as graphs: a step is captured once for each batch size, and replayed from then on.

A step of few sequences spends its time in starting a thousand small kernels; a replay starts them all at once: a CUDA
graph, or on a CPU the calls of our kernels (`native/recording.py`). What a graph reads lies in buffers that stay where
they are: a step copies its integers there, of the block tables only what changed. On CUDA there are few sizes; rows
that fill up a batch have length 0 and write to a slot that no sequence has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, repeat
from operator import mul
from typing import Protocol

import torch
from torch import Tensor

from fastchat.engine.scheduler import ScheduledBatch, ScheduledSequence
from fastchat.engine.staging import send
from fastchat.native.paged_queries import PagedQueries


class Graph(Protocol):
    """A captured computation."""

    def replay(self) -> Tensor:
        """Compute again what was captured, from what its inputs hold now; the same tensor every time."""


class GraphBackend(Protocol):
    """How a computation is captured."""

    def sizes(self, max_running: int) -> list[int]:
        """The batch sizes to capture, ascending, up to `max_running`."""

    def capture(self, compute: Callable[[], Tensor]) -> Graph:
        """Capture `compute`, which may be called several times; each time it gives the same."""


@dataclass(frozen=True, slots=True)
class DecodeInputs:
    """What a forward pass of decoding sequences reads, each a part of a buffer; B sequences."""

    token_ids: Tensor
    """# (B,)"""
    positions: Tensor
    """# (B,)"""
    slots: Tensor
    """# (B,)"""
    queries: PagedQueries


class DecodeGraphs:
    """The graphs of one engine, captured when their size is first wanted."""

    def __init__(
        self,
        backend: GraphBackend,
        forward: Callable[[DecodeInputs], Tensor],
        *,
        max_running: int,
        max_blocks: int,
        block_size: int,
        spare_slot: int,
        device: torch.device,
    ) -> None:
        """`forward` gives hidden states (B, hidden_size); `max_blocks` are those of the longest sequence."""
        self._backend = backend
        self._forward = forward
        self._sizes = backend.sizes(max_running)
        self._block_size = block_size
        self._spare_slot = spare_slot
        self._device = device
        self._graphs: dict[int, Graph] = {}
        # Token ids, positions, slots and lengths, so that one copy sets them all.
        self._numbers = torch.zeros((4, self._sizes[-1]), dtype=torch.int64, device=device)
        self._starts = torch.arange(self._sizes[-1], device=device)
        self._counts = torch.ones_like(self._starts)
        self._tables = torch.zeros((self._sizes[-1], max_blocks), dtype=torch.int64, device=device)
        self._held_tables: list[list[int]] = [[] for _ in range(self._sizes[-1])]

    def __repr__(self) -> str:
        return f"<DecodeGraphs captured {sorted(self._graphs)} up to {self._sizes[-1]}>"

    def takes(self, batch: ScheduledBatch) -> bool:
        """Whether every sequence has one token of its answer to compute, without an adapter and without a draft."""
        return len(batch.scheduled) <= self._sizes[-1] and all(map(_is_plain_decoding, batch.scheduled))

    def run(self, batch: ScheduledBatch) -> Tensor:
        """Hidden states of the batch's tokens, (len(batch.scheduled), hidden_size); good until the next run."""
        num_sequences = len(batch.scheduled)
        size = next(size for size in self._sizes if size >= num_sequences)
        self._set_inputs(batch.scheduled, size)
        if size not in self._graphs:
            inputs = self._inputs(size)
            self._graphs[size] = self._backend.capture(lambda: self._forward(inputs))
        return self._graphs[size].replay()[:num_sequences]

    def _inputs(self, size: int) -> DecodeInputs:
        token_ids, positions, slots, lengths = self._numbers[:, :size]
        queries = PagedQueries(
            self._starts[:size], self._counts[:size], lengths, self._tables[:size], self._block_size, max_count=1
        )
        return DecodeInputs(token_ids, positions, slots, queries)

    def _set_inputs(self, items: tuple[ScheduledSequence, ...], size: int) -> None:
        padding = [0] * (size - len(items))
        changed_places, changed_blocks = self._changes(items)
        places = [item.start for item in items]
        numbers, at, blocks = send(
            [
                [item.sequence.token_ids[item.start] for item in items]
                + padding
                + places
                + padding
                + [self._slot(item) for item in items]
                + [self._spare_slot] * len(padding)
                + [place + 1 for place in places]
                + padding,
                changed_places,
                changed_blocks,
            ],
            self._device,
        )
        self._numbers[:, :size].copy_(numbers.view(4, size))
        self._tables.view(-1).index_copy_(0, at, blocks)

    def _slot(self, item: ScheduledSequence) -> int:
        block, offset = divmod(item.start, self._block_size)
        return item.sequence.block_ids[block] * self._block_size + offset

    def _changes(self, items: tuple[ScheduledSequence, ...]) -> tuple[list[int], list[int]]:
        """Where the tables on the device are not those of the sequences, and the blocks that belong there."""
        places: list[int] = []
        blocks: list[int] = []
        for row, item in enumerate(items):
            held, wanted = self._held_tables[row], item.sequence.block_ids
            if held == wanted:
                continue
            first = len(held) if wanted[: len(held)] == held else 0
            begin = row * self._tables.shape[1]
            places += range(begin + first, begin + len(wanted))
            blocks += wanted[first:]
            self._held_tables[row] = wanted.copy()
        return places, blocks


class CudaGraphs:
    """torch's CUDA graphs; those of one engine share their memory, since only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def sizes(self, max_running: int) -> list[int]:
        """Few: a row more costs nothing, a graph holds memory."""
        return batch_sizes(max_running)

    def capture(self, compute: Callable[[], Tensor]) -> CudaGraph:
        """Compute once on another stream, as torch demands, so that nothing is compiled or tuned while capturing."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch gives it no types
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = compute()
        return CudaGraph(graph, output)


@dataclass(frozen=True, slots=True)
class CudaGraph:
    """A graph and the tensor that it writes."""

    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        """Start it; the host does not wait."""
        self.graph.replay()
        return self.output


def batch_sizes(max_running: int) -> list[int]:
    """Powers of two below `max_running`, and that itself."""
    powers = accumulate(repeat(2, max_running.bit_length()), mul, initial=1)
    return [*(size for size in powers if size < max_running), max_running]


def _is_plain_decoding(item: ScheduledSequence) -> bool:
    return item.sequence.is_decoding and item.sequence.adapter is None and not item.draft
