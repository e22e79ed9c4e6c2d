"""Small random models of every family that the engine runs, straight from transformers' classes."""

import torch
from transformers import (
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 512
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "glm": lambda: GlmForCausalLM(GlmConfig(**SHAPE, partial_rotary_factor=0.5, attention_bias=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=7)),
}


def make_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights every time; embeddings large enough that greedy text does not repeat itself at once."""
    torch.manual_seed(1)
    model = FAMILIES[family]().eval().requires_grad_(requires_grad=False)
    model.get_input_embeddings().weight.normal_(0.0, 1.0)
    return model.to(dtype)
