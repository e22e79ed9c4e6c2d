"""What one model needs of a device's memory, by the rules of the engine that will run it. Pure arithmetic, torch-free.

weights    as they are held, and adapters, from the headers of the files
text       tokenizer and prompt format, in the worker's process
a step     what is alive at its peak: one layer's inner numbers, or the logits of all its rows
KV cache   keys and values, block by block; between the least that is of use and the most that can be used
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastchat.engine.engine_config import (
    DEFAULT_MAX_BATCH_TOKENS,
    DEFAULT_MAX_RUNNING,
    default_block_size,
    max_logits_rows,
    max_sampled_rows,
    max_useful_blocks,
)
from fastchat.errors import ConfigError
from fastchat.models.adapter_folder import AnyAdapter
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.footprint import Footprint
from fastchat.models.precision import choose_dtype
from fastchat.models.stored_form import FLOAT_BYTES, FloatName, Quantization
from fastchat.models.stored_quantization import choose_quantization
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import ChosenDevice

LEAST_CONTEXT = 4096
"""Tokens of the context that must fit where nobody asked for a length: less is hardly a conversation."""

LOGITS_BYTES = 10
"""For each number of a row of logits: as the model gives it, in float32, and as a log probability."""
SAMPLED_ROW_BYTES = 28
"""For each number of a row that is sampled: the logits edited and scaled, weights, cut-offs, sums in float64."""
MASK_BYTES = 5
"""For each pair of a token and a place before it: what may be seen, as a truth value and as a number."""
TEXT_BYTES = 10 * 2**20
TOKENIZER_FILE_FACTOR = 10
"""What tokenizers hold for each byte of their files: an estimate on the safe side."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model to plan for: its headers, read once for all variants of a plan."""

    name: str
    path: Path
    max_context: int
    config: Mapping[str, Any]  # Any: JSON as it is on disk
    footprint: Footprint
    text_bytes: int
    num_adapter_values: int = 0

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str, adapters: Iterable[AnyAdapter] = ()) -> PlannedModel:
        """Read the headers. Raises `CheckpointError` for what cannot be loaded."""
        files = (checkpoint.path / name for name in TOKENIZER_FILES)
        num_file_bytes = sum(file.stat().st_size for file in files if file.is_file())
        return cls(
            name=name,
            path=checkpoint.path,
            max_context=checkpoint.max_context,
            config=checkpoint.config,
            footprint=Footprint.of(checkpoint),
            text_bytes=TEXT_BYTES + TOKENIZER_FILE_FACTOR * num_file_bytes,
            num_adapter_values=sum(folder.num_values for folder in adapters),
        )


@dataclass(frozen=True, slots=True)
class ModelNeeds:
    """One model's needs, in bytes and tokens. `context` is what was asked for, or the checkpoint's own.

    `least_context` must fit; it is less than `context` only where nobody asked for a length.
    """

    model: PlannedModel
    device: ChosenDevice
    dtype: FloatName
    quantization: Quantization | None
    weight_bytes: Mapping[str, int]
    context: int
    least_context: int
    max_batch_tokens: int
    max_running: int
    wanted_cache_bytes: int | None
    adapter_reserve_bytes: int = 0
    """For adapters that come later."""

    @classmethod
    def of(cls, model: PlannedModel, engine: EngineSpec, device: ChosenDevice) -> ModelNeeds:
        """The needs of a model that is run so."""
        footprint = model.footprint
        dtype = choose_dtype(engine.dtype, device=device, config=model.config, stored=footprint.stored_dtype)
        quantization = choose_quantization(model.config, engine.quantization)
        context = min(engine.max_context or model.max_context, model.max_context)
        needs = cls(
            model=model,
            device=device,
            dtype=dtype,
            quantization=quantization,
            weight_bytes=footprint.weight_bytes(dtype, quantization),
            context=context,
            least_context=min(context, LEAST_CONTEXT) if engine.max_context is None else context,
            max_batch_tokens=engine.max_batch_tokens or DEFAULT_MAX_BATCH_TOKENS,
            max_running=engine.max_running or DEFAULT_MAX_RUNNING,
            wanted_cache_bytes=engine.kv_cache_bytes,
            adapter_reserve_bytes=engine.adapter_reserve_bytes,
        )
        if engine.kv_cache_bytes is not None and engine.kv_cache_bytes < needs.block_bytes:
            raise ConfigError(
                f"{model.name}: a KV cache of {engine.kv_cache_bytes} bytes holds no block of {needs.block_size} "
                f"tokens ({needs.block_bytes} bytes); give --kv-cache-memory more."
            )
        return needs

    @property
    def lasting_bytes(self) -> int:
        """What is there from loading on, whether or not anything is computed, and what is kept free for adapters."""
        held_bytes = sum(self.weight_bytes.values()) + self.adapter_bytes + self.model.text_bytes
        return held_bytes + self.adapter_reserve_bytes

    @property
    def adapter_bytes(self) -> int:
        """The adapters that are there from the start."""
        return self.model.num_adapter_values * FLOAT_BYTES[self.dtype]

    @property
    def block_size(self) -> int:
        """Tokens in a block of the KV cache."""
        return default_block_size(self.device)

    @property
    def block_bytes(self) -> int:
        """The memory of a block."""
        return self.model.footprint.cache_bytes(self.dtype, self.block_size)

    @property
    def cache_bytes_per_token(self) -> int:
        """What one token leaves in the KV cache."""
        return self.model.footprint.cache_bytes(self.dtype, 1)

    def cache_bytes(self, num_tokens: int) -> int:
        """The blocks that so many tokens of one sequence fill."""
        return -(-num_tokens // self.block_size) * self.block_bytes

    @property
    def least_working_bytes(self) -> int:
        """A step and the smallest KV cache that will do."""
        if self.wanted_cache_bytes is not None:
            return self.most_working_bytes
        return self.step_bytes(self.least_context) + self.cache_bytes(self.least_context)

    @property
    def most_working_bytes(self) -> int:
        """A step and the largest KV cache that can be used, or the one that was asked for."""
        useful = max_useful_blocks(self.context, self.max_running, self.block_size) * self.block_bytes
        if self.wanted_cache_bytes is None:
            return self.step_bytes(self.context) + useful
        cache_bytes = min(useful, self.wanted_cache_bytes // self.block_bytes * self.block_bytes)
        return self.step_bytes(min(self.context, self._tokens_in(cache_bytes))) + cache_bytes

    def context_within(self, working_bytes: int) -> int:
        """The longest context whose step and KV cache those bytes hold; 0 where there is none."""
        if self.wanted_cache_bytes is not None:
            return min(self.context, self._tokens_in(self.wanted_cache_bytes))
        if self.step_bytes(self.context) + self.cache_bytes(self.context) <= working_bytes:
            return self.context
        low, high = 0, self.context // self.block_size
        while low < high:
            middle = (low + high + 1) // 2 * self.block_size
            fits = self.step_bytes(middle) + self.cache_bytes(middle) <= working_bytes
            low, high = (middle // self.block_size, high) if fits else (low, middle // self.block_size - 1)
        return low * self.block_size

    def step_bytes(self, context: int) -> int:
        """What is alive at the peak of a step of `max_batch_tokens` tokens, one of its sequences `context` long."""
        shape, tokens, size = self.model.footprint, self.max_batch_tokens, FLOAT_BYTES[self.dtype]
        kv_values = shape.kv_values_per_token // max(1, shape.num_layers)  # of one layer, K and V
        residual = tokens * shape.hidden_size * (2 * size + 2 * 4)  # and its norm, which is computed in float32
        mlp = tokens * shape.intermediate_size * 4 * size  # gate, up, the activated gate, their product
        attention = tokens * (3 * shape.query_size + 2 * kv_values) * size
        attention += context * kv_values * size + min(tokens, context) * context * MASK_BYTES
        logits = min(tokens, max_logits_rows(self.device)) * shape.vocab_size * LOGITS_BYTES
        logits += min(self.max_running, max_sampled_rows(self.device)) * shape.vocab_size * SAMPLED_ROW_BYTES
        return residual + max(mlp, attention, logits)

    def _tokens_in(self, cache_bytes: int) -> int:
        return cache_bytes // self.block_bytes * self.block_size
