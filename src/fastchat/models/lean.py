"""Lean layers: a family's decoder layers with the same maths in a fraction of the operations.

transformers writes its layers to be read; a step of one token spends more time between its small operations than in
them. `make_lean` swaps each decoder layer for one whose projections are joined (query, key and value; gate and up) and
whose normalisation, rotation and activation are one call each. The parameters are the same tensors, joined; the model
around the layers stays transformers' own, and so does the attention function that it was given.

A packed batch is one row of T tokens for transformers, (1, T, S); inside a layer it is (T, S).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastchat.models.quantized_linear import Int4Linear, Int8Linear
from fastchat.models.shared_tensors import PROCESS_TENSORS, side_by_side
from fastchat.native.layers import add_rms_norm, add_rows, normalize_heads, rms_norm, rotate, silu_and_multiply
from fastchat.native.products import multiply

Untyped = Any
"""A module of transformers: its attributes are those of the family, which no type tells."""

INTERLEAVED_CLASSES = frozenset({"GlmModel"})
"""Decoders whose rotary pairs are (2i, 2i + 1); in the others a pair is (i, i + half of the rotated width)."""

LEAN_CLASSES = frozenset({"GlmModel", "LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"})

WINDOW_OF_CONFIG_CLASSES = frozenset({"MistralAttention"})
"""Attention that reads its window from the configuration; where a config.json of another family names one, transformers
does not read it."""


def make_lean(model: PreTrainedModel) -> None:
    """Swap the decoder layers in place; a family whose layers are built otherwise keeps its own."""
    decoder: Untyped = model.get_decoder()
    kind = type(decoder).__name__
    if kind not in LEAN_CLASSES or model.config.hidden_act != "silu":
        return
    for index, layer in enumerate(decoder.layers):
        decoder.layers[index] = LeanLayer(layer, index, is_interleaved=kind in INTERLEAVED_CLASSES)
    decoder.rotary_emb = LeanRotary(decoder.rotary_emb)
    decoder.norm = LeanNorm(decoder.norm)
    model.set_output_embeddings(join_rows([model.get_output_embeddings()]))


class LeanLinear(nn.Linear):
    """A linear module of plain numbers, whose product reads the one copy of its weight at any number of rows."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, rows: Tensor) -> Tensor:
        """(T, K) -> (T, N)."""
        return multiply(rows, self.weight, self.bias)


class LeanNorm(nn.Module):
    """The last norm of a decoder, in one call."""

    def __init__(self, norm: Untyped) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(1, T, S) -> the same."""
        return _norm(hidden_states[0], self).unsqueeze(0)


class LeanRotary(nn.Module):
    """The angles of a step's tokens, once for all layers."""

    def __init__(self, rotary: Untyped) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each (T, R / 2); transformers' own repeat them to (1, T, R)."""
        cosines, sines = self.rotary(hidden_states, position_ids)
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()


class LeanLayer(nn.Module):
    """Attention and MLP with their residuals."""

    def __init__(self, layer: Untyped, index: int, *, is_interleaved: bool) -> None:
        super().__init__()
        self.self_attn = LeanAttention(layer.self_attn, index, is_interleaved=is_interleaved)
        mlp = layer.mlp
        is_joined = hasattr(mlp, "gate_up_proj")
        self.gate_up_proj = join_rows([mlp.gate_up_proj] if is_joined else [mlp.gate_proj, mlp.up_proj])
        self.down_proj = join_rows([mlp.down_proj])
        self.input_layernorm = layer.input_layernorm
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: None = None,
        **options: Any,  # what the model passes through to attention
    ) -> Tensor:
        """(1, T, S), which is changed in place -> the same."""
        assert attention_mask is None, "the attention of a packed batch makes its own masks"
        residual = hidden_states[0]
        attended = self.self_attn(_norm(residual, self.input_layernorm), position_embeddings, options)
        post = self.post_attention_layernorm
        normed = add_rms_norm(attended, residual, post.weight, post.variance_epsilon)
        add_rows(self.down_proj(silu_and_multiply(self.gate_up_proj(normed))), residual)
        return hidden_states


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
        self.num_rotated = self.num_heads + attention.config.num_key_value_heads
        self.q_norm: Untyped = getattr(attention, "q_norm", None)
        self.k_norm: Untyped = getattr(attention, "k_norm", None)
        self.qkv_proj = join_rows([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o_proj = join_rows([attention.o_proj])
        self._is_interleaved = is_interleaved

    def forward(self, rows: Tensor, angles: tuple[Tensor, Tensor], options: dict[str, Any]) -> Tensor:
        """(T, S) -> (T, S)."""
        heads = self.qkv_proj(rows).unflatten(-1, (-1, self.head_dim))  # (T, H + 2K, D)
        if self.q_norm is not None:
            for part, norm in (
                (heads[:, : self.num_heads], self.q_norm),
                (heads[:, self.num_heads : self.num_rotated], self.k_norm),
            ):
                normalize_heads(part, norm.weight, norm.variance_epsilon)
        rotate(heads[:, : self.num_rotated], *angles, is_interleaved=self._is_interleaved)
        by_head = heads.transpose(0, 1).unsqueeze(0)  # (1, H + 2K, T, D)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]  # noqa: SLF001 - where transformers keeps it
        attended, _ = attend(
            self,
            by_head[:, : self.num_heads],
            by_head[:, self.num_heads : self.num_rotated],
            by_head[:, self.num_rotated :],
            None,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **options,
        )  # (1, T, H, D)
        output: Tensor = self.o_proj(attended[0].flatten(1))
        return output


_TENSORS_OF_ROWS: dict[type, tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    Int8Linear: ("weight", "scales", "bias"),
    Int4Linear: ("packed", "scales", "bias"),
}
"""What a linear module holds for each of its rows, in the order of its constructor."""


def join_rows(parts: Sequence[Untyped]) -> Untyped:
    """One linear module whose rows are those of `parts`; their tensors are let go.

    Every tensor of a linear, quantized or not, has a row for each output, so joining changes no bit of a result.
    Raises `TypeError` for parts of different kinds.
    """
    kind = type(parts[0])
    if any(type(part) is not kind for part in parts):
        raise TypeError(f"cannot join {[type(part).__name__ for part in parts]}")
    tensors: list[Untyped] = [_joined([getattr(part, name) for part in parts]) for name in _TENSORS_OF_ROWS[kind]]
    for part in parts:
        for name in _TENSORS_OF_ROWS[kind]:
            setattr(part, name, None)
    if kind is Int4Linear:
        return Int4Linear(*tensors, in_features=parts[0].in_features)
    return LeanLinear(*tensors) if kind is nn.Linear else kind(*tensors)


def _joined(tensors: Sequence[nn.Parameter | None]) -> nn.Parameter | None:
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < 2:
        return present[0] if present else None
    whole = side_by_side(present)
    if whole is not None:  # another model of this process has the same
        joined = nn.Parameter(whole, requires_grad=False)
    else:
        joined = nn.Parameter(torch.cat([*present]), requires_grad=False)
    PROCESS_TENSORS.moved(present, joined)
    return joined


def _norm(rows: Tensor, norm: Untyped) -> Tensor:
    return rms_norm(rows, norm.weight, norm.variance_epsilon)


def _sliding_window(attention: Untyped) -> int | None:
    """The window of one layer: on the module where a family has it for some layers, else in Mistral's configuration."""
    owner = attention.config if type(attention).__name__ in WINDOW_OF_CONFIG_CLASSES else attention
    window: int | None = getattr(owner, "sliding_window", None)
    return window
