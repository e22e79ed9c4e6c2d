"""Write a Qwen2 checkpoint as GGUF files for llama.cpp; runs in llama.cpp's own virtual environment, without torch.

    .peers/llama-cpp/bin/python benchmarks/peers/write_gguf.py CHECKPOINT FOLDER

bfloat16 is written as it is; Q8_0 and Q4_0 are made of it by llama.cpp's own quantizer with its own choices.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

QUANTIZED = {"int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}


def read_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """bfloat16 tensors of a safetensors file as their 16 bits; format: 8 bytes of length, JSON, the numbers."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    content = np.memmap(file, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
        begin, end = entry["data_offsets"]
        yield name, content[begin:end].view(np.uint16).reshape(entry["shape"])


def write_bfloat16(checkpoint: Path, target: Path) -> None:
    """Matrices in bfloat16; vectors in float32, since llama.cpp adds them so."""
    config = json.loads((checkpoint / "config.json").read_text())
    num_layers = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, num_layers)
    for name, bits in read_tensors(checkpoint / "model.safetensors"):
        stem, suffix = name.rsplit(".", 1)
        new_name = f"{names.get_name(stem)}.{suffix}"
        if bits.ndim == 1:
            writer.add_tensor(new_name, (bits.astype(np.uint32) << 16).view(np.float32))
        else:
            writer.add_tensor(new_name, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """All three files; those that are there stay."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2, help="of the quantizer (default: 2)")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True, exist_ok=True)
    source = flags.folder / "bfloat16.gguf"
    if not source.exists():
        unfinished = source.with_suffix(".unfinished")
        write_bfloat16(flags.checkpoint, unfinished)
        unfinished.rename(source)
    for weights, file_type in QUANTIZED.items():
        target = flags.folder / f"{weights}.gguf"
        if target.exists():
            continue
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.ftype, settings.nthread = file_type, flags.threads
        unfinished = target.with_suffix(".unfinished")
        if llama_cpp.llama_model_quantize(str(source).encode(), str(unfinished).encode(), settings):
            raise SystemExit(f"{target} could not be made")
        unfinished.rename(target)


if __name__ == "__main__":
    main()
