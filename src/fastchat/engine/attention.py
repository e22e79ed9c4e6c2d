"""Attention over the paged KV cache, plugged into transformers' models through `AttentionInterface`.

A step is one packed batch: the new tokens of all sequences side by side, `[1, num_tokens]`. The model hands each
layer's queries, keys and values to `paged_attention` together with the step's `AttentionStep`; the new keys and
values are written to their slots, then every sequence attends over its own blocks.

Four kernels, one result (there are equality tests):

    attend_each     one call per sequence; adjacent blocks are read in place. For CPU.
    attend_native   all sequences in one call of our C++. For CPU where C++ can be had.
    attend_triton   decoding sequences in one launch, chunks of prompts in another. For CUDA.
    attend_padded   decoding sequences in one padded call, the rest one by one. For CUDA without Triton.

Query heads that share a KV head become query rows (decode) or a broadcast dimension (prefill), so keys and values
are never copied per query head. Letters: H query heads, K KV heads, G = H / K, D head size, L context length.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from fastchat.native import attention as native_attention
from fastchat.native.attention import Queries
from fastchat.native.paged_queries import PagedQueries

ATTENTION_NAME = "fastchat_paged"


class KVCacheTensors:
    """Keys and values of all layers, in places called slots: slot = block id * block size + offset."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        shape = (num_layers, 2, num_kv_heads, num_blocks * block_size, head_dim)
        # Views are made once: every layer of every step asks for its own.
        self._layers = [(layer[0], layer[1]) for layer in _zeros(shape, dtype, device)]

    def layer(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer, each (num_kv_heads, num_slots, head_dim)."""
        return self._layers[layer_index]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because a padded read may touch a slot that was never written, and 0 * NaN is NaN.

    On CPU they come from numpy, whose zeros are pages that cost no memory until they are written; torch writes its own.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


@dataclass(slots=True)
class SequenceSpan:
    """One sequence within a step: its rows of the packed batch and its blocks."""

    query_start: int
    num_queries: int
    context_length: int
    """Tokens to attend over, the new ones included."""
    block_ids: list[int]
    first_slot: int | None
    """Where the blocks begin if they are adjacent, else None."""
    block_index: Tensor | None
    """The block ids as a tensor on the device where they are not adjacent."""
    is_prompt: bool = False
    """Whether its rows begin within a prompt."""
    masks: dict[int | None, Tensor | None] = field(default_factory=dict)
    """The causal mask for each sliding window that this step's layers use."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """One layer's share of a step."""

    query: Tensor
    """# (H, num_tokens, D)"""
    new_keys: Tensor
    """# (K, num_tokens, D), for the kernel to write to their slots"""
    new_values: Tensor
    """# (K, num_tokens, D)"""
    keys: Tensor
    """The cache. # (K, num_slots, D)"""
    values: Tensor
    """# (K, num_slots, D)"""
    scaling: float
    window: int | None
    """The layer's sliding window in tokens."""


@dataclass(slots=True)
class AttentionStep:
    """What the layers need to know of the step; one object for all layers."""

    cache: KVCacheTensors
    kernel: Callable[[LayerInputs, AttentionStep], Tensor]
    slots: Tensor
    """Where the new tokens' keys and values go. # (num_tokens,)"""
    spans: list[SequenceSpan]
    on_layer: Callable[[], None]
    """Called once per layer: the engine's sign of life within a long step."""
    padded_blocks: Tensor | None = None
    """Block ids of the decoding spans for `attend_padded`, filled up with 0. # (num_decoding, max_blocks)"""
    queries: Queries | None = None
    """The spans as `attend_native` takes them."""
    paged_queries: tuple[PagedQueries, ...] = ()
    """The spans as `attend_triton` takes them."""


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    attention_step: AttentionStep,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,  # whatever else a family passes through to its attention (position ids, ...); options are checked at load
) -> tuple[Tensor, None]:
    """The function transformers' attention modules call.

    query (1, H, num_tokens, D), key and value (1, K, num_tokens, D) -> (1, num_tokens, H, D).
    """
    assert attention_mask is None, "paged attention makes its own masks"
    assert dropout == 0.0, "the model is not in eval mode"
    layer_index = module.layer_idx
    assert isinstance(layer_index, int)
    keys, values = attention_step.cache.layer(layer_index)
    inputs = LayerInputs(query[0], key[0], value[0], keys, values, scaling, sliding_window)
    output = attention_step.kernel(inputs, attention_step)
    attention_step.on_layer()
    return output.unsqueeze(0), None


def attend_each(inputs: LayerInputs, step: AttentionStep) -> Tensor:
    """One attention call per sequence. -> (num_tokens, H, D)."""
    _write_new(inputs, step)
    output = _new_output(inputs.query)
    for span in step.spans:
        _attend_span(inputs, step, span, output)
    return output


def attend_padded(inputs: LayerInputs, step: AttentionStep) -> Tensor:
    """Decoding sequences in one padded call, chunks of prompts one by one. -> (num_tokens, H, D)."""
    _write_new(inputs, step)
    output = _new_output(inputs.query)
    decoding = [span for span in step.spans if span.num_queries == 1]
    if decoding:
        rows = torch.tensor([span.query_start for span in decoding], device=output.device)
        output[rows] = _attend_decoding(inputs, step, decoding, rows)
    for span in step.spans:
        if span.num_queries > 1:
            _attend_span(inputs, step, span, output)
    return output


def attend_triton(inputs: LayerInputs, step: AttentionStep) -> Tensor:
    """Everything by Triton's kernels. -> (num_tokens, H, D)."""
    from fastchat.native.triton_attention import attend  # Triton comes with torch's CUDA build alone

    _write_new(inputs, step)
    output = _new_output(inputs.query)
    for queries in step.paged_queries:
        attend(queries, inputs.query, inputs.keys, inputs.values, output, scaling=inputs.scaling, window=inputs.window)
    return output


def attend_native(inputs: LayerInputs, step: AttentionStep) -> Tensor:
    """Everything in one native call. -> (num_tokens, H, D)."""
    assert step.queries is not None
    output = _new_output(inputs.query)
    native_attention.attend(
        step.queries,
        inputs.query,
        (inputs.new_keys, inputs.new_values),
        (inputs.keys, inputs.values),
        output,
        scaling=inputs.scaling,
        window=inputs.window,
    )
    return output


def native_queries(spans: list[SequenceSpan], slots: Tensor, block_size: int) -> Queries:
    """The spans as `attend_native` takes them."""
    sequences = [
        (span.query_start, span.num_queries, span.context_length, span.block_ids, span.is_prompt) for span in spans
    ]
    return Queries.of(sequences, slots, block_size)


def native_decoding(queries: PagedQueries, slots: Tensor) -> Queries:
    """Sequences with one new token each as `attend_native` takes them; the tensors are the same."""
    return Queries(
        queries.starts, queries.counts, queries.lengths, queries.tables, len(queries.starts), slots, queries.block_size
    )


def _write_new(inputs: LayerInputs, step: AttentionStep) -> None:
    inputs.keys.index_copy_(1, step.slots, inputs.new_keys)
    inputs.values.index_copy_(1, step.slots, inputs.new_values)


def _new_output(query: Tensor) -> Tensor:
    num_heads, num_tokens, head_dim = query.shape
    return query.new_empty((num_tokens, num_heads, head_dim))


def _attend_span(inputs: LayerInputs, step: AttentionStep, span: SequenceSpan, output: Tensor) -> None:
    """Fill in one sequence's rows of `output`."""
    keys = _gather(inputs.keys, span, step.cache.block_size)  # (K, L, D)
    values = _gather(inputs.values, span, step.cache.block_size)
    if span.num_queries == 1:
        output[span.query_start] = _attend_one_query(inputs, span, keys, values)
        return
    num_kv_heads, context_length, head_dim = keys.shape
    end = span.query_start + span.num_queries
    query = inputs.query[:, span.query_start : end]
    grouped = query.reshape(num_kv_heads, -1, span.num_queries, head_dim)  # (K, G, num_queries, D)
    expanded = (num_kv_heads, grouped.shape[1], context_length, head_dim)
    mask = _causal_mask(span, inputs.window, query.device)
    attended = scaled_dot_product_attention(
        grouped,
        keys.unsqueeze(1).expand(expanded),
        values.unsqueeze(1).expand(expanded),
        attn_mask=mask,
        is_causal=mask is None,
        scale=inputs.scaling,
    )  # (K, G, num_queries, D)
    output[span.query_start : end] = attended.permute(2, 0, 1, 3).reshape(span.num_queries, -1, head_dim)


def _attend_one_query(inputs: LayerInputs, span: SequenceSpan, keys: Tensor, values: Tensor) -> Tensor:
    """A decoding sequence; keys and values (K, L, D) -> (H, D)."""
    if inputs.window is not None:
        keys, values = keys[:, -inputs.window :], values[:, -inputs.window :]
    num_kv_heads, _, head_dim = keys.shape
    rows = inputs.query[:, span.query_start].reshape(1, num_kv_heads, -1, head_dim)  # (1, K, G, D)
    attended = scaled_dot_product_attention(rows, keys.unsqueeze(0), values.unsqueeze(0), scale=inputs.scaling)
    return attended.reshape(-1, head_dim)


def _attend_decoding(inputs: LayerInputs, step: AttentionStep, spans: list[SequenceSpan], rows: Tensor) -> Tensor:
    """B decoding sequences, whose queries are at `rows` (B,) of the packed batch -> (B, H, D)."""
    assert step.padded_blocks is not None
    num_kv_heads, _, head_dim = inputs.keys.shape
    padded_length = step.padded_blocks.shape[1] * step.cache.block_size
    lengths = torch.tensor([span.context_length for span in spans], device=rows.device).unsqueeze(1)  # (B, 1)
    places = torch.arange(padded_length, device=rows.device).unsqueeze(0)  # (1, L)
    mask = places < lengths
    if inputs.window is not None:
        mask &= places >= lengths - inputs.window
    keys, values = (
        tensor.view(num_kv_heads, -1, step.cache.block_size, head_dim)[:, step.padded_blocks]
        .reshape(num_kv_heads, len(spans), padded_length, head_dim)
        .transpose(0, 1)
        for tensor in (inputs.keys, inputs.values)
    )  # (B, K, L, D)
    query = inputs.query[:, rows].transpose(0, 1).reshape(len(spans), num_kv_heads, -1, head_dim)  # (B, K, G, D)
    attended = scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None, :], scale=inputs.scaling)
    return attended.reshape(len(spans), -1, head_dim)


def _gather(tensor: Tensor, span: SequenceSpan, block_size: int) -> Tensor:
    """A sequence's keys or values in order, (K, L, D): a view where its blocks are adjacent, else a copy."""
    if span.first_slot is not None:
        return tensor[:, span.first_slot : span.first_slot + span.context_length]
    num_kv_heads, _, head_dim = tensor.shape
    assert span.block_index is not None
    blocks = tensor.view(num_kv_heads, -1, block_size, head_dim).index_select(1, span.block_index)
    return blocks.view(num_kv_heads, -1, head_dim)[:, : span.context_length]


def _causal_mask(span: SequenceSpan, window: int | None, device: torch.device) -> Tensor | None:
    """Which places each query may see, (num_queries, L); None where plain causal attention says it all."""
    if window not in span.masks:
        starts_at_zero = span.context_length == span.num_queries
        if starts_at_zero and (window is None or window >= span.context_length):
            span.masks[window] = None
        else:
            places = torch.arange(span.context_length, device=device)
            queries = places[-span.num_queries :].unsqueeze(1)
            mask = places <= queries
            span.masks[window] = mask if window is None else mask & (places > queries - window)
    return span.masks[window]
