"""Lean layers: a family's decoder layers with the same maths in a fraction of the operations.

transformers writes its layers to be read; a step of one token spends more time between its small operations than in
them. `make_lean` swaps each decoder layer for one whose projections are fused (query, key and value; gate and up) and
whose normalisation, rotation and activation are one operation each. The parameters are the same tensors, joined; the
model around the layers stays transformers' own, and so does the attention function that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastchat.models.quantized_linear import QuantizedLinear

Untyped = Any
"""A module of transformers: its attributes are those of the family, which no type tells."""

INTERLEAVED_CLASSES = frozenset({"GlmModel"})
"""Decoders whose rotary pairs are (2i, 2i + 1); in the others a pair is (i, i + half of the rotated width)."""

LEAN_CLASSES = frozenset({"GlmModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})


def make_lean(model: PreTrainedModel) -> None:
    """Swap the decoder layers in place; a family whose layers are built otherwise keeps its own."""
    decoder: Untyped = model.get_decoder()
    kind = type(decoder).__name__
    if kind not in LEAN_CLASSES or model.config.hidden_act != "silu":
        return
    decoder.norm = LeanNorm(decoder.norm)
    is_interleaved = kind in INTERLEAVED_CLASSES
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = LeanLayer(layer, index, is_interleaved=is_interleaved)


class LeanNorm(nn.Module):
    """RMSNorm as one operation."""

    def __init__(self, norm: Untyped) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps: float = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> the same."""
        return rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class LeanLayer(nn.Module):
    """Attention and MLP with their residuals, over a packed batch of T tokens."""

    def __init__(self, layer: Untyped, index: int, *, is_interleaved: bool) -> None:
        super().__init__()
        self.input_layernorm = LeanNorm(layer.input_layernorm)
        self.self_attn = LeanAttention(layer.self_attn, index, is_interleaved=is_interleaved)
        self.post_attention_layernorm = LeanNorm(layer.post_attention_layernorm)
        self.mlp = LeanMLP(layer.mlp)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        **options: Any,  # what the model passes through to attention
    ) -> Tensor:
        """(1, T, hidden_size) -> the same."""
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings, options
        )
        mlp_output: Tensor = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + mlp_output


class LeanAttention(nn.Module):
    """Self-attention with one product for queries, keys and values. H query heads, K KV heads, D head size."""

    def __init__(self, attention: Untyped, index: int, *, is_interleaved: bool) -> None:
        super().__init__()
        self.config = attention.config
        self.layer_idx = index
        self.head_dim: int = attention.head_dim
        self.scaling: float = attention.scaling
        self.sliding_window = _sliding_window(attention)
        self.num_heads: int = attention.config.num_attention_heads
        self.num_kv_heads: int = attention.config.num_key_value_heads
        self.q_norm = LeanNorm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.k_norm = LeanNorm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.qkv_proj = join_rows((attention.q_proj, attention.k_proj, attention.v_proj))
        self.o_proj = attention.o_proj
        self._rotate = _rotate_interleaved if is_interleaved else _rotate_halves

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], options: dict[str, Any]
    ) -> Tensor:
        """(1, T, hidden_size) -> the same."""
        num_rotated = self.num_heads + self.num_kv_heads
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.head_dim))  # (1, T, H + 2K, D)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = heads[:, :, : self.num_heads], heads[:, :, self.num_heads : num_rotated]
            rotated = torch.cat((self.q_norm(query), self.k_norm(key)), dim=2)
        else:
            rotated = heads[:, :, :num_rotated]
        rotated = self._rotate(rotated, *position_embeddings).transpose(1, 2)  # (1, H + K, T, D)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]  # noqa: SLF001 - where transformers keeps it
        options = {name: value for name, value in options.items() if name != "attention_mask"}
        attended, _ = attend(
            self,
            rotated[:, : self.num_heads],
            rotated[:, self.num_heads :],
            heads[:, :, num_rotated:].transpose(1, 2),
            None,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **options,
        )  # (1, T, H, D)
        output: Tensor = self.o_proj(attended.flatten(2))
        return output


class LeanMLP(nn.Module):
    """The gated MLP with one product for gate and up."""

    def __init__(self, mlp: Untyped) -> None:
        super().__init__()
        is_joined = hasattr(mlp, "gate_up_proj")
        self.gate_up_proj = mlp.gate_up_proj if is_joined else join_rows((mlp.gate_proj, mlp.up_proj))
        self.down_proj = mlp.down_proj

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, hidden_size) -> the same."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        output: Tensor = self.down_proj(silu(gate) * up)
        return output


def join_rows(parts: Sequence[Untyped]) -> nn.Module:
    """One linear module whose rows are those of `parts`; their tensors are let go.

    Every parameter of a linear, quantized or not, has a row for each output, so joining changes no bit of a result.
    """
    first = parts[0]
    names = [name for name, _ in first.named_parameters()]
    shapes = [[type(part), *(getattr(part, name).shape[1:] for name in names)] for part in parts]
    if not isinstance(first, nn.Linear | QuantizedLinear) or any(shape != shapes[0] for shape in shapes):
        raise TypeError(f"cannot join {[type(part).__name__ for part in parts]}")
    first.out_features = sum(part.out_features for part in parts)
    for name in names:
        joined = torch.cat([getattr(part, name) for part in parts])
        for part in parts:
            setattr(part, name, None)
        setattr(first, name, nn.Parameter(joined, requires_grad=False))
    return first


def _sliding_window(attention: Untyped) -> int | None:
    """The window of one layer: on the module where a family has it for some layers, else in the configuration."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def _rotate_interleaved(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the pairs (2i, 2i + 1). (1, T, heads, D) with cos, sin (1, T, R), R <= D."""
    half = cos.shape[-1] // 2
    cos, sin = cos[:, :, None, :half], sin[:, :, None, :half]
    pairs = heads[..., : 2 * half].reshape(*heads.shape[:-1], half, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)
    return torch.cat((turned, heads[..., 2 * half :]), dim=-1)


def _rotate_halves(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of the pairs (i, i + R/2). (1, T, heads, D) with cos, sin (1, T, R), R <= D."""
    width = cos.shape[-1]
    rotated = heads[..., :width]
    first, second = rotated.chunk(2, dim=-1)
    turned = rotated * cos.unsqueeze(2) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(2)
    return turned if width == heads.shape[-1] else torch.cat((turned, heads[..., width:]), dim=-1)
