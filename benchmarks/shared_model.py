"""The model that all engines of the comparison load: a 0.5B Qwen2 shape with random weights, 988 MB in bfloat16.

    python benchmarks/shared_model.py FOLDER

A whole checkpoint, with a tokenizer of bytes, so that a server loads it too; what it says is noise.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.engine import SHAPES, build_model  # noqa: E402 - the line above makes `benchmarks` and `tests` known
from tests.checkpoints import CHATML_TEMPLATE, byte_level_definition  # noqa: E402

SHAPE = "qwen2-0.5b"


def write_shared_model(folder: Path, num_layers: int | None = None) -> None:
    """Write the checkpoint, unless it is there."""
    if (folder / "tokenizer_config.json").exists():
        return
    torch.manual_seed(0)
    build_model(SHAPE, num_layers, torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(byte_level_definition(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>",
                "chat_template": CHATML_TEMPLATE,
                "model_max_length": SHAPES[SHAPE][1]["max_position_embeddings"],
            }
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="fewer layers, to try things out")
    flags = parser.parse_args()
    write_shared_model(flags.folder, flags.layers)
