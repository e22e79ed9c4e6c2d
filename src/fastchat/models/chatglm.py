"""ChatGLM2 and ChatGLM3 in their original layout, as transformers' `Glm`: the maths is the same. Torch-free.

    transformer.embedding.word_embeddings          model.embed_tokens
    transformer.encoder.layers.N.input_layernorm   model.layers.N.input_layernorm        (post_attention_... likewise)
      .self_attention.query_key_value                .self_attn.{q,k,v}_proj             rows: q, then k, then v
      .self_attention.dense                          .self_attn.o_proj
      .mlp.dense_h_to_4h                             .mlp.gate_up_proj                   rows: gate, then up, kept fused
      .mlp.dense_4h_to_h                             .mlp.down_proj
    transformer.encoder.final_layernorm            model.norm
    transformer.output_layer                       lm_head
    transformer.rotary_pos_emb.inv_freq            computed here

Pre-norm RMSNorm, grouped queries, SwiGLU, rotary angles on the first half of a head in interleaved pairs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastchat.errors import UnsupportedModelError

Config = Mapping[str, Any]  # Any: config.json as it is on disk

SUPPORTED_OPTIONS: Mapping[str, bool] = {
    "multi_query_attention": True,
    "rmsnorm": True,
    "post_layer_norm": True,
    "original_rope": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "fp32_residual_connection": False,
    "interleaved_qkv": False,
}
"""Options that change the maths, with the one value we compute."""

OTHER_DEFAULTS: Mapping[str, bool] = {"multi_query_attention": False}
"""What a missing option is in the original, where that is not what we compute."""

CONFIG_NAMES: Mapping[str, str] = {
    "padded_vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "multi_query_group_num": "num_key_value_heads",
    "kv_channels": "head_dim",
    "seq_length": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}

_LAYER = re.compile(r"transformer\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES: Mapping[str, tuple[str, ...]] = {
    "input_layernorm": ("input_layernorm",),
    "post_attention_layernorm": ("post_attention_layernorm",),
    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.dense": ("self_attn.o_proj",),
    "mlp.dense_h_to_4h": ("mlp.gate_up_proj",),
    "mlp.dense_4h_to_h": ("mlp.down_proj",),
}
_OUTER_NAMES: Mapping[str, tuple[str, ...]] = {
    "transformer.embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "transformer.encoder.final_layernorm.weight": ("model.norm.weight",),
    "transformer.output_layer.weight": ("lm_head.weight",),
    "transformer.rotary_pos_emb.inv_freq": (),
}


def check_config(config: Config) -> None:
    """Raise `UnsupportedModelError` for the first ChatGLM, for prefix tuning and unknown maths."""
    if "position_encoding_2d" in config or "inner_hidden_size" in config:
        raise UnsupportedModelError(
            "config.json: this is the first ChatGLM-6B, a different architecture that does not run here; "
            "use ChatGLM2-6B or ChatGLM3-6B"
        )
    if config.get("pre_seq_len"):
        raise UnsupportedModelError(
            "config.json: pre_seq_len asks for a P-tuning prefix encoder, which does not run here; "
            "use the base checkpoint or one with merged weights"
        )
    for option, supported in SUPPORTED_OPTIONS.items():
        value = config.get(option, OTHER_DEFAULTS.get(option, supported))
        if bool(value) != supported:
            raise UnsupportedModelError(
                f"config.json: {option} is {value!r}, but only {supported} runs here for chatglm"
            )
    optional = [] if config.get("rope_ratio") is None else ["rope_ratio"]
    for name in (*CONFIG_NAMES, *optional):
        value = config.get(name)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise UnsupportedModelError(f"config.json: {name} must be a positive number, not {value!r}")


def map_config(config: Config, format_name: str | None) -> dict[str, Any]:  # Any: values of a JSON file
    """The keyword arguments of `GlmConfig` for a checked config.json."""
    mapped = {new: config[old] for old, new in CONFIG_NAMES.items()}
    mapped["attention_bias"] = bool(config.get("add_qkv_bias", False))
    mapped["tie_word_embeddings"] = bool(config.get("tie_word_embeddings", False))
    mapped["rope_parameters"] = _rope_parameters(float(config.get("rope_ratio") or 1.0), format_name)
    mapped["pad_token_id"] = None  # the class's own default lies outside of this vocabulary
    return mapped


def rename(name: str) -> tuple[str, ...]:
    """See `Family.rename`; an unknown name comes back as it is and is reported as unexpected."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        return (name,)
    return tuple(f"model.layers.{match[1]}.{new}.{match[3]}" for new in _LAYER_NAMES[match[2]])


def _rope_parameters(ratio: float, format_name: str | None) -> dict[str, str | float]:
    """`rope_ratio` stretches positions in ChatGLM2 (its 32k variant), and the base in ChatGLM3 and later.

    Two independent engines read it so: ztxz16/fastllm src/models/chatglm.cpp `UpdateRotaryPosEmb`, and
    alibaba/rtp-llm rtp_llm/models/chat_glm_v3.py `get_rotary_embedding_scale`.
    """
    if ratio != 1.0 and format_name == "chatglm2":
        return {"rope_type": "linear", "factor": ratio, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return {"rope_type": "default", "rope_theta": 10000.0 * ratio, "partial_rotary_factor": 0.5}
