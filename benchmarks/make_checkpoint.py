"""Write a checkpoint of ChatGLM2-6B's real shape, in its original layout, with random weights.

    python benchmarks/make_checkpoint.py /tmp/chatglm2-6b                    7 .bin shards, 12.5 GB
    python benchmarks/make_checkpoint.py /tmp/chatglm2-6b --layout safetensors --shards 16
    python benchmarks/make_checkpoint.py /tmp/small --layers 2               the same shape, two layers

The tensors, shapes and total size (12,487,168,064 bytes) are those of THUDM/chatglm2-6b; what it says is noise.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "src" / "fastchat" / "models" / "demo" / "chatglm2-demo" / "tokenizer.model"

HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM, VOCAB = 4096, 13696, 32, 2, 128, 65024
QKV = (HEADS + 2 * GROUPS) * HEAD_DIM
LAYER_SHAPES: dict[str, tuple[int, ...]] = {
    "input_layernorm.weight": (HIDDEN,),
    "self_attention.query_key_value.weight": (QKV, HIDDEN),
    "self_attention.query_key_value.bias": (QKV,),
    "self_attention.dense.weight": (HIDDEN, HEADS * HEAD_DIM),
    "post_attention_layernorm.weight": (HIDDEN,),
    "mlp.dense_h_to_4h.weight": (2 * FFN, HIDDEN),
    "mlp.dense_4h_to_h.weight": (HIDDEN, FFN),
}


def shapes(num_layers: int, num_tokens: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All tensors in the order of the original shards."""
    yield "transformer.embedding.word_embeddings.weight", (num_tokens, HIDDEN)
    yield "transformer.rotary_pos_emb.inv_freq", (HEAD_DIM // 4,)
    for layer in range(num_layers):
        for name, shape in LAYER_SHAPES.items():
            yield f"transformer.encoder.layers.{layer}.{name}", shape
    yield "transformer.encoder.final_layernorm.weight", (HIDDEN,)
    yield "transformer.output_layer.weight", (num_tokens, HIDDEN)


def random_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """float16, scaled so that activations stay in range through all layers."""
    if name.endswith("inv_freq"):
        return (10000.0 ** -(torch.arange(0, shape[0]) / shape[0])).half()
    if "layernorm" in name:
        return torch.ones(shape, dtype=torch.float16)
    bound = 1.0 if "word_embeddings" in name else (3 / shape[-1]) ** 0.5
    return torch.empty(shape, dtype=torch.float16).uniform_(-bound, bound)


def config(num_layers: int, num_tokens: int) -> dict[str, object]:
    """The fields of the original config.json that say what the model is."""
    return {
        "_name_or_path": "THUDM/chatglm2-6b",
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "ffn_hidden_size": FFN,
        "fp32_residual_connection": False,
        "hidden_size": HIDDEN,
        "kv_channels": HEAD_DIM,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": GROUPS,
        "num_attention_heads": HEADS,
        "num_layers": num_layers,
        "original_rope": True,
        "padded_vocab_size": num_tokens,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 32768,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def write_checkpoint(
    folder: Path, *, layout: str, num_shards: int, num_layers: int, num_tokens: int, tokenizer: Path
) -> int:
    """Write everything; returns the tensors' total size in bytes. One shard is in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    planned = list(shapes(num_layers, num_tokens))
    total_bytes = sum(2 * torch.Size(shape).numel() for _, shape in planned)
    suffix, stem = ("bin", "pytorch_model") if layout == "bin" else ("safetensors", "model")
    weight_map: dict[str, str] = {}
    shard: dict[str, Tensor] = {}
    num_written_bytes = 0
    for number, (name, shape) in enumerate(planned):
        shard[name] = random_tensor(name, shape)
        num_written_bytes += shard[name].nbytes
        index = len({*weight_map.values()}) + 1
        if num_written_bytes * num_shards >= index * total_bytes or number == len(planned) - 1:
            file = f"{stem}-{index:05}-of-{num_shards:05}.{suffix}"
            if layout == "bin":
                torch.save(shard, folder / file)
            else:
                save_file(shard, folder / file, metadata={"format": "pt"})
            print(f"{file}: {sum(tensor.nbytes for tensor in shard.values()) / 1e9:.2f} GB", flush=True)
            weight_map |= dict.fromkeys(shard, file)
            shard = {}
    index_name = f"{stem}.{suffix}.index.json"
    index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / index_name).write_text(json.dumps(index_file, indent=1))
    (folder / "config.json").write_text(json.dumps(config(num_layers, num_tokens), indent=1))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": "THUDM/chatglm2-6b", "tokenizer_class": "ChatGLMTokenizer"})
    )
    shutil.copyfile(tokenizer, folder / "tokenizer.model")
    return total_bytes


def main() -> None:
    """Read the flags and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layout", choices=["bin", "safetensors"], default="bin")
    parser.add_argument("--shards", type=int, default=7)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocabulary", type=int, default=VOCAB, help="rows of embedding and head")
    parser.add_argument("--tokenizer", type=Path, default=TOKENIZER, help="a SentencePiece tokenizer.model")
    flags = parser.parse_args()
    torch.manual_seed(0)
    total_bytes = write_checkpoint(
        flags.folder,
        layout=flags.layout,
        num_shards=flags.shards,
        num_layers=flags.layers,
        num_tokens=flags.vocabulary,
        tokenizer=flags.tokenizer,
    )
    print(f"{flags.folder}: {total_bytes:,} bytes of tensors")


if __name__ == "__main__":
    main()
