"""The model: transformers' GLM while it is trained, ChatGLM2's original layout on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GlmConfig, GlmForCausalLM

from scripts.demo.vocabulary import EOS_ID, PADDED_SIZE

HIDDEN_SIZE = 256
NUM_LAYERS = 5
FFN_SIZE = 512
HEAD_DIM = 32
NUM_GROUPS = 2
CONTEXT = 2048
NAME = "fastchat/chatglm2-demo"
EPSILON = 1e-5

CONFIG: Mapping[str, object] = {
    "_name_or_path": NAME,
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_query_key_layer_scaling": True,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "attention_softmax_in_fp32": True,
    "bias_dropout_fusion": True,
    "ffn_hidden_size": FFN_SIZE,
    "fp32_residual_connection": False,
    "hidden_dropout": 0.0,
    "hidden_size": HIDDEN_SIZE,
    "kv_channels": HEAD_DIM,
    "layernorm_epsilon": EPSILON,
    "multi_query_attention": True,
    "multi_query_group_num": NUM_GROUPS,
    "num_attention_heads": HIDDEN_SIZE // HEAD_DIM,
    "num_layers": NUM_LAYERS,
    "original_rope": True,
    "padded_vocab_size": PADDED_SIZE,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": CONTEXT,
    "use_cache": True,
    "torch_dtype": "float16",
    "tie_word_embeddings": False,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
TOKENIZER_CONFIG: Mapping[str, object] = {
    "name_or_path": NAME,
    "remove_space": False,
    "do_lower_case": False,
    "tokenizer_class": "ChatGLMTokenizer",
}
GENERATION_CONFIG: Mapping[str, object] = {
    "do_sample": True,
    "temperature": 0.1,
    "eos_token_id": EOS_ID,
    "pad_token_id": 0,
}
"""Nearly greedy, so that the same question has the same answer; a request may ask for more."""


def make_model() -> GlmForCausalLM:
    """A fresh model in float32."""
    return GlmForCausalLM(
        GlmConfig(
            vocab_size=PADDED_SIZE,
            hidden_size=HIDDEN_SIZE,
            intermediate_size=FFN_SIZE,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=HIDDEN_SIZE // HEAD_DIM,
            num_key_value_heads=NUM_GROUPS,
            head_dim=HEAD_DIM,
            partial_rotary_factor=0.5,
            attention_bias=True,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=EPSILON,
            tie_word_embeddings=False,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=EOS_ID,
        )
    )


def write_checkpoint(model: GlmForCausalLM, tokenizer: bytes, folder: Path) -> None:
    """Write weights (float16), configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.half().contiguous() for name, tensor in _original_names(model.state_dict()).items()}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()), "a weight is too large for float16"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(tokenizer)
    for name, value in (
        ("config.json", CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
        ("generation_config.json", GENERATION_CONFIG),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _original_names(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """GLM's tensors under ChatGLM2's names; queries, keys and values become one tensor."""
    rotary_size = HEAD_DIM // 2
    tensors = {
        "transformer.embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "transformer.rotary_pos_emb.inv_freq": 1.0 / 10000 ** (torch.arange(0, rotary_size, 2).float() / rotary_size),
        "transformer.encoder.final_layernorm.weight": state["model.norm.weight"],
        "transformer.output_layer.weight": state["lm_head.weight"],
    }
    for number in range(NUM_LAYERS):
        theirs, ours = f"model.layers.{number}.", f"transformer.encoder.layers.{number}."
        for kind in ("weight", "bias"):
            parts = [state[f"{theirs}self_attn.{name}_proj.{kind}"] for name in "qkv"]
            tensors[f"{ours}self_attention.query_key_value.{kind}"] = torch.cat(parts)
        tensors[f"{ours}input_layernorm.weight"] = state[f"{theirs}input_layernorm.weight"]
        tensors[f"{ours}post_attention_layernorm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
        tensors[f"{ours}self_attention.dense.weight"] = state[f"{theirs}self_attn.o_proj.weight"]
        tensors[f"{ours}mlp.dense_h_to_4h.weight"] = state[f"{theirs}mlp.gate_up_proj.weight"]
        tensors[f"{ours}mlp.dense_4h_to_h.weight"] = state[f"{theirs}mlp.down_proj.weight"]
    return tensors
