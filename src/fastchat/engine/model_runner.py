"""Turns a scheduled batch into one packed forward pass and its logits. Knows tensors, not policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from fastchat.engine.adapters import AdapterHost, AdapterRows
from fastchat.engine.attention import (
    ATTENTION_NAME,
    AttentionStep,
    KVCacheTensors,
    SequenceSpan,
    attend_each,
    attend_native,
    attend_padded,
    native_decoding,
    native_queries,
    paged_attention,
)
from fastchat.engine.decode_graphs import DecodeGraphs, DecodeInputs
from fastchat.engine.engine_config import max_logits_rows
from fastchat.engine.execution import Execution
from fastchat.engine.paged_step import paged_queries
from fastchat.engine.scheduler import ScheduledBatch, ScheduledSequence
from fastchat.engine.sequence import Sequence
from fastchat.engine.staging import send


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a forward pass gave. Hidden states are those that `ModelRunner.logits` takes."""

    sampling: list[ScheduledSequence] = field(default_factory=list)
    """Those whose next token can be sampled, in the order of `last_hidden`'s rows."""
    last_hidden: Tensor | None = None
    """For each its last token and then its draft. # (num_rows, hidden_size)"""
    prompt_hidden: list[tuple[ScheduledSequence, Tensor]] = field(default_factory=list)
    """For sequences that want their logits: a row for each place of the chunk. # (num_tokens, hidden_size)"""
    hidden_sums: list[tuple[Sequence, Tensor]] = field(default_factory=list)
    """For embeddings: the chunk's final hidden states added up, in float64. # (hidden_size,)"""


class ModelRunner:
    """Holds the model and the KV cache tensors of one engine."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_blocks: int,
        block_size: int,
        max_running: int,
        max_context: int,
        execution: Execution,
        on_layer: Callable[[], None],
        host: AdapterHost | None = None,
    ) -> None:
        # Attention makes its own masks; transformers builds none for a name that it knows no mask for.
        AttentionInterface.register(ATTENTION_NAME, paged_attention)
        model.set_attn_implementation(ATTENTION_NAME)
        self.device = model.device
        self.vocab_size: int = model.get_output_embeddings().out_features
        self._decoder = model.get_decoder()
        self._output_head = model.get_output_embeddings()
        self._on_layer = on_layer
        self._host = host
        self._execution = execution
        self._kernel = execution.kernel
        self._max_logits_rows = max_logits_rows(self.device.type)
        shape = KVShape.of(model)
        self._cache = KVCacheTensors(
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            num_blocks=num_blocks + (execution.graphs is not None),  # one to write to for rows that fill up a batch
            block_size=block_size,
            dtype=model.dtype,
            device=self.device,
        )
        self._graphs: DecodeGraphs | None = None
        if execution.graphs is not None:
            self._graphs = DecodeGraphs(
                execution.graphs,
                self._forward_decoding,
                max_running=max_running,
                max_blocks=-(-max_context // block_size),
                block_size=block_size,
                spare_slot=num_blocks * block_size,
                device=self.device,
            )

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch) -> StepOutput:
        """Compute the batch's tokens; their keys and values are in the cache afterwards."""
        if self._graphs is not None and self._graphs.takes(batch):
            hidden_states = self._graphs.run(batch)
            self._on_layer()
            return StepOutput(list(batch.scheduled), hidden_states)
        batch = _grouped_by_adapter(batch)
        token_ids: list[int] = []
        positions: list[int] = []
        slot_numbers: list[int] = []
        spans: list[SequenceSpan] = []
        for item in batch.scheduled:
            spans.append(self._span(item, query_start=len(token_ids)))
            token_ids += item.sequence.token_ids[item.start : item.end]
            token_ids += item.draft
            positions += range(item.start, item.end + len(item.draft))
            slot_numbers += self._slots(item)
            self._fill_prefix(item)
        ids, places, slots = send([token_ids, positions, slot_numbers], self.device)
        step = AttentionStep(
            cache=self._cache,
            kernel=self._kernel,
            slots=slots,
            spans=spans,
            on_layer=self._on_layer,
            padded_blocks=self._padded_blocks(spans) if self._kernel is attend_padded else None,
            queries=native_queries(spans, slots, self._cache.block_size) if self._kernel is attend_native else None,
            paged_queries=paged_queries(spans, self._cache.block_size, self.device) if self._is_paged else (),
        )
        if self._host is not None:
            self._host.use(_adapter_rows(batch, spans))
        return self._collect(batch, spans, self._forward(ids, places, step))

    @property
    def _is_paged(self) -> bool:
        return self._execution.takes_paged_queries

    def _forward(self, token_ids: Tensor, positions: Tensor, step: AttentionStep) -> Tensor:
        """Hidden states of the packed batch, (num_tokens, hidden_size)."""
        hidden_states: Tensor = self._decoder(
            input_ids=token_ids.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            attention_step=step,
        ).last_hidden_state
        return hidden_states[0]

    def _forward_decoding(self, inputs: DecodeInputs) -> Tensor:
        if self._host is not None:
            self._host.use([])  # a graph has no adapter's rows
        step = AttentionStep(
            cache=self._cache,
            kernel=self._kernel,
            slots=inputs.slots,
            spans=[],
            on_layer=self._on_layer,
            queries=native_decoding(inputs.queries, inputs.slots) if self._kernel is attend_native else None,
            paged_queries=(inputs.queries,),
        )
        return self._forward(inputs.token_ids, inputs.positions, step)

    def _collect(self, batch: ScheduledBatch, spans: list[SequenceSpan], hidden_states: Tensor) -> StepOutput:
        """Only the rows that somebody needs."""
        sampling: list[ScheduledSequence] = []
        last_rows: list[int] = []
        prompt_hidden: list[tuple[ScheduledSequence, Tensor]] = []
        hidden_sums: list[tuple[Sequence, Tensor]] = []
        for item, span in zip(batch.scheduled, spans, strict=True):
            rows = slice(span.query_start, span.query_start + span.num_queries)
            if item.sequence.request.wants_embedding:
                hidden_sums.append((item.sequence, _sum_of(hidden_states[rows])))
                continue
            if item.sequence.wants_prompt_logprobs:
                prompt_hidden.append((item, hidden_states[rows]))
            if item.is_last_chunk:
                sampling.append(item)
                last_rows += range(rows.stop - 1 - len(item.draft), rows.stop)
        last_hidden = hidden_states.index_select(0, *send([last_rows], self.device)) if last_rows else None
        return StepOutput(sampling, last_hidden, prompt_hidden, hidden_sums)

    @torch.inference_mode()
    def logits(self, hidden_states: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits of (num_rows, hidden_size), a few rows at a time: which rows, # (those, vocab_size)."""
        for start in range(0, len(hidden_states), self._max_logits_rows):
            rows = slice(start, start + self._max_logits_rows)
            logits: Tensor = self._output_head(hidden_states[rows])
            yield rows, logits.float()

    def _span(self, item: ScheduledSequence, query_start: int) -> SequenceSpan:
        block_size = self._cache.block_size
        context_length = item.sequence.num_prefix_slots + item.end + len(item.draft)
        block_ids = item.sequence.block_ids[: -(-context_length // block_size)]
        reads_index = self._kernel in {attend_each, attend_padded}
        are_adjacent = block_ids == list(range(block_ids[0], block_ids[0] + len(block_ids)))
        return SequenceSpan(
            query_start=query_start,
            num_queries=item.num_rows,
            context_length=context_length,
            block_ids=block_ids,
            first_slot=block_ids[0] * block_size if are_adjacent else None,
            block_index=torch.tensor(block_ids, device=self.device) if reads_index and not are_adjacent else None,
            is_prompt=item.start < item.sequence.num_prompt_tokens,
        )

    def _slots(self, item: ScheduledSequence) -> list[int]:
        before = item.sequence.num_prefix_slots
        return self._slots_of(item.sequence, before + item.start, before + item.end + len(item.draft))

    def _slots_of(self, sequence: Sequence, start: int, end: int) -> list[int]:
        block_size, block_ids = self._cache.block_size, sequence.block_ids
        return [block_ids[i // block_size] * block_size + i % block_size for i in range(start, end)]

    def _fill_prefix(self, item: ScheduledSequence) -> None:
        """An adapter's keys and values in front of a sequence that begins, or begins anew."""
        adapter = item.sequence.adapter
        if adapter is None or item.start > 0 or not adapter.change.num_prefix_slots:
            return
        slots = torch.tensor(self._slots_of(item.sequence, 0, adapter.change.num_prefix_slots), device=self.device)
        for index, (keys, values) in enumerate(zip(*adapter.change.prefix, strict=True)):
            held_keys, held_values = self._cache.layer(index)
            held_keys.index_copy_(1, slots, keys)
            held_values.index_copy_(1, slots, values)

    def _padded_blocks(self, spans: list[SequenceSpan]) -> Tensor | None:
        tables = [span.block_ids for span in spans if span.num_queries == 1]
        if not tables:
            return None
        width = max(len(table) for table in tables)
        return torch.tensor([table + [0] * (width - len(table)) for table in tables], device=self.device)


@dataclass(frozen=True, slots=True)
class KVShape:
    """What a model keeps for every token."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    bytes_per_element: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> KVShape:
        """Read from a transformers model's configuration."""
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, model.dtype.itemsize)

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers for one token."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.bytes_per_element


def _sum_of(rows: Tensor) -> Tensor:
    """(num_tokens, hidden_size) added up so exactly that it shows in no float32 where a prompt was cut."""
    if rows.device.type == "mps":  # which lacks float64
        rows = rows.cpu()
    return rows.sum(dim=0, dtype=torch.float64)


def _grouped_by_adapter(batch: ScheduledBatch) -> ScheduledBatch:
    """The rows of one adapter side by side, so that each takes one product; the model's own rows come first."""
    if all(item.sequence.adapter is None for item in batch.scheduled):
        return batch
    return ScheduledBatch(tuple(sorted(batch.scheduled, key=_adapter_number)))


def _adapter_number(item: ScheduledSequence) -> int:
    return item.sequence.adapter.number if item.sequence.adapter is not None else 0


def _adapter_rows(batch: ScheduledBatch, spans: list[SequenceSpan]) -> list[AdapterRows]:
    """One entry for each adapter of a grouped batch."""
    rows: list[AdapterRows] = []
    for item, span in zip(batch.scheduled, spans, strict=True):
        if item.sequence.adapter is None:
            continue
        change, start, stop = item.sequence.adapter.change, span.query_start, span.query_start + span.num_queries
        if rows and rows[-1].change is change:
            start = rows.pop().start
        rows.append(AdapterRows(change, start, stop))
    return rows
