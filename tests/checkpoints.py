"""Small random checkpoints of every family, with a tokenizer made on the spot: offline, in about a second.

The text that such a model writes means nothing, but its numbers are real: the layout on disk is that of published
checkpoints, and the embeddings are wide enough that greedy text does not repeat one token.
"""

from __future__ import annotations

import io
import json
import math
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file

FamilyName = Literal["chatglm2", "chatglm3", "glm", "llama", "qwen2", "qwen3", "mistral"]
FAMILIES: tuple[FamilyName, ...] = ("chatglm2", "chatglm3", "glm", "llama", "qwen2", "qwen3", "mistral")
NATIVE_FAMILIES: tuple[FamilyName, ...] = ("glm", "llama", "qwen2", "qwen3", "mistral")

MISTRAL_WINDOW = 16
PADDED_VOCAB_SIZE = 512

SENTENCES = (
    "你好，我是一个人工智能助手。",
    "你是谁？我能帮你做什么？",
    "今天天气很好，我们去公园散步吧。",
    "如何使用这个模型来回答问题？",
    "请用中文写一首关于春天的诗。",
    "一加一等于二，二加二等于四。",
    "北京是中国的首都，上海是最大的城市。",
    "晚上睡不着怎么办？可以听一听音乐。",
    "Hello! What is your name?",
    "Once upon a time there was a small model that could talk.",
    "The quick brown fox jumps over the lazy dog.",
    "def add(a, b):\n    return a + b",
    "How do I write a function that returns the sum of two numbers?",
    "The answer is 42, and the question is not known.",
    "[Round 1]\n\n问：你好\n\n答：你好！",
    "user assistant system tool observation",
)

CHATML_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SOFT_TOKENS = ("<think>", "</think>")


def write_checkpoint(
    folder: Path,
    family: FamilyName,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    num_shards: int = 2,
    layout: Literal["bin", "safetensors"] = "safetensors",
    chat_template: str | None = CHATML_TEMPLATE,
    config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a whole checkpoint into `folder`, which is made, and return it.

    `config` overrides entries of config.json. `chat_template` None leaves the template out (ChatGLM's never have one).
    """
    folder.mkdir(parents=True, exist_ok=True)
    if family in ("chatglm2", "chatglm3"):
        raw = {**_chatglm_config(family, dtype), **(config or {})}
        tensors = _chatglm_tensors(raw, seed)
        _write_chatglm_tokenizer(folder, family)
    else:
        raw = {**_native_config(family, dtype), **(config or {})}
        tensors = _native_tensors(raw, seed)
        _write_byte_level_tokenizer(folder, chat_template)
    _write_json(folder / "config.json", raw)
    if generation_config is not None:
        _write_json(folder / "generation_config.json", generation_config)
    write_weights(folder, {name: value.to(dtype) for name, value in tensors.items()}, num_shards, layout)
    return folder


def write_hollow_checkpoint(
    folder: Path, family: FamilyName, *, dtype: torch.dtype, config: Mapping[str, Any] | None = None
) -> Path:
    """A checkpoint of any size whose weights are zeros that take no space on disk: true headers, nothing behind them.

    It loads, and answers with the token 0. The first value of each tensor is its own: equal ones are shared.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_chatglm = family in ("chatglm2", "chatglm3")
    raw = {**(_chatglm_config(family, dtype) if is_chatglm else _native_config(family, dtype)), **(config or {})}
    if is_chatglm:
        _write_chatglm_tokenizer(folder, family)
    else:
        _write_byte_level_tokenizer(folder, CHATML_TEMPLATE)
    _write_json(folder / "config.json", raw)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in (_chatglm_shapes(raw) if is_chatglm else _native_shapes(raw)).items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        kind = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + end)
        for number, about in enumerate(header.values(), zlib.crc32(family.encode()) % 10_000):
            file.seek(start + about["data_offsets"][0])
            file.write(number.to_bytes(2, "little"))
    return folder


def write_weights(
    folder: Path, tensors: Mapping[str, torch.Tensor], num_shards: int, layout: Literal["bin", "safetensors"]
) -> None:
    """Write tensors as published checkpoints do: one file, or shards with an index."""
    stem = "pytorch_model" if layout == "bin" else "model"
    names = list(tensors)
    size = math.ceil(len(names) / num_shards)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        held = {name: tensors[name].contiguous() for name in names[shard * size : (shard + 1) * size]}
        number = "" if num_shards == 1 else f"-{shard + 1:05d}-of-{num_shards:05d}"
        file = folder / f"{stem}{number}.{layout}"
        if layout == "bin":
            torch.save(held, file)
        else:
            save_file(held, file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(held, file.name))
    if num_shards > 1:
        num_bytes = sum(value.numel() * value.element_size() for value in tensors.values())
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        _write_json(folder / f"{stem}.{layout}.index.json", index)


def _chatglm_config(family: str, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "_name_or_path": f"THUDM/{family}-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {"AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration"},
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": 96,
        "fp32_residual_connection": False,
        "hidden_size": 48,
        "kv_channels": 16,
        "layernorm_epsilon": 1e-05,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": 2,
        "original_rope": True,
        "padded_vocab_size": PADDED_VOCAB_SIZE,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 512,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def _chatglm_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The original names and shapes; `query_key_value` holds the rows of q, k and v."""
    hidden, inner = config["hidden_size"], config["ffn_hidden_size"]
    head, heads, groups = config["kv_channels"], config["num_attention_heads"], config["multi_query_group_num"]
    vocab, rows = config["padded_vocab_size"], (heads + 2 * groups) * head
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    for layer in range(config["num_layers"]):
        prefix = f"transformer.encoder.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}self_attention.query_key_value.weight": (rows, hidden),
            f"{prefix}self_attention.query_key_value.bias": (rows,),
            f"{prefix}self_attention.dense.weight": (hidden, heads * head),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}mlp.dense_h_to_4h.weight": (2 * inner, hidden),
            f"{prefix}mlp.dense_4h_to_h.weight": (hidden, inner),
        }
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = (vocab, hidden)
    return shapes


def _chatglm_tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    head = config["kv_channels"]
    tensors = _random_tensors(_chatglm_shapes(config), seed)
    frequencies = 1.0 / (10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2)))
    return {**tensors, "transformer.rotary_pos_emb.inv_freq": frequencies}


def _native_config(family: str, dtype: torch.dtype) -> dict[str, Any]:
    prefix = family.capitalize()
    config: dict[str, Any] = {
        "architectures": [f"{prefix}ForCausalLM"],
        "model_type": family,
        "vocab_size": PADDED_VOCAB_SIZE,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "tie_word_embeddings": family == "qwen2",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if family == "qwen2":
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if family == "glm":
        config |= {"attention_bias": True, "partial_rotary_factor": 0.5}
    if family == "mistral":
        config["sliding_window"] = MISTRAL_WINDOW
    return config


def _native_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes from transformers' own class, which is built without memory."""
    prefix = str(config["model_type"]).capitalize()
    built = getattr(transformers, f"{prefix}Config").from_dict(dict(config))
    with torch.device("meta"):
        model = getattr(transformers, f"{prefix}ForCausalLM")(built)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if built.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _native_tensors(config: Mapping[str, Any], seed: int) -> dict[str, torch.Tensor]:
    # A tied embedding of unit scale would make every position predict its own token again.
    scale = 0.1 if config["tie_word_embeddings"] else 1.0
    return _random_tensors(_native_shapes(config), seed, embedding_scale=scale)


def _random_tensors(
    shapes: Mapping[str, tuple[int, ...]], seed: int, *, embedding_scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """Matrices that keep a vector's length, norms around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            tensors[name] = 1.0 + 0.1 * noise
        elif name.endswith("bias"):
            tensors[name] = 0.1 * noise
        elif "embed" in name:
            tensors[name] = embedding_scale * noise
        else:
            tensors[name] = noise * (1.5 / math.sqrt(shape[-1]))
    return tensors


def _write_chatglm_tokenizer(folder: Path, family: str) -> None:
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    config = {
        "name_or_path": f"THUDM/{family}-6b",
        "remove_space": False,
        "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }
    _write_json(folder / "tokenizer_config.json", config)


@cache
def sentencepiece_model() -> bytes:
    """A BPE model with byte pieces, identity normaliser and dummy prefix, as ChatGLM's."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_lines(),
        model_writer=writer,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=3,
    )
    return writer.getvalue()


def _lines() -> Iterator[str]:
    for sentence in SENTENCES:
        yield from sentence.splitlines()


def _write_byte_level_tokenizer(folder: Path, chat_template: str | None) -> None:
    (folder / "tokenizer.json").write_text(byte_level_definition(), encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    _write_json(folder / "tokenizer_config.json", config)


@cache
def byte_level_definition() -> str:
    """tokenizer.json of a byte-level BPE with ChatML's special tokens first and two added tokens that are not."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(CHATML_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in SOFT_TOKENS])
    return str(tokenizer.to_str())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
