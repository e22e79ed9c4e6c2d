"""`fastchat models`: what can be said of a model before it is loaded, and the models of a running server.

`inspect PATH` says what a folder is and what loading it will take, without loading it; the other actions are those of
`model_control_command.py`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastchat.models.checkpoint import Checkpoint
from fastchat.models.inspection import Inspection, inspect_checkpoint
from fastchat.models.precision import choose_dtype, declared_dtype
from fastchat.models.stored_form import FloatName, Quantization, QuantizedName
from fastchat.ops.logs import configure_logging
from fastchat.serve.arguments import create_parser, run_command
from fastchat.serve.model_control_command import add_control_parsers, run_control
from fastchat.serve.sizes import size_text

_FLOATS: tuple[FloatName, ...] = ("float32", "bfloat16", "float16")
_QUANTIZED: tuple[QuantizedName, ...] = ("int8", "int4")


def create_models_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = create_parser(
        "models_command", "The models of a running server, and what can be said of a folder before it is loaded."
    )
    parser.prog = "fastchat models"
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    inspect = actions.add_parser(
        "inspect",
        help="say what a folder is and what loading it will take",
        description="Reads the small files of a checkpoint and the headers of its weights. Exit code 2: the folder "
        "cannot be loaded, for the reason in the last line.",
    )
    inspect.add_argument("path", type=Path, metavar="PATH", help="the folder of a checkpoint")
    inspect.add_argument(
        "--conv-template",
        metavar="NAME",
        help="look at it with this prompt format, by name or as a .json file (default: the checkpoint's own)",
    )
    inspect.add_argument("--json", action="store_true", help="write JSON, sizes in bytes (default: for reading)")
    add_control_parsers(actions)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Do what is asked; returns the exit code. Raises what a server answers, or why a folder cannot be loaded."""
    arguments = create_models_parser().parse_args(argv)
    configure_logging("models", level="ERROR")
    if arguments.action != "inspect":
        return run_control(arguments)
    inspection = inspect_checkpoint(Checkpoint.open(arguments.path), conv_template=arguments.conv_template)
    if arguments.json:
        sys.stdout.write(json.dumps(as_json(inspection), ensure_ascii=False, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(as_lines(inspection)) + "\n")
    return 0


def as_json(inspection: Inspection) -> dict[str, Any]:  # Any: JSON
    """The facts for a program; sizes in bytes, lengths in tokens."""
    checkpoint, weights, prompt = inspection.checkpoint, inspection.footprint, inspection.prompt_format
    context = checkpoint.max_context
    return {
        "path": str(checkpoint.path),
        "name": checkpoint.name,
        "family": checkpoint.family.name,
        "model_class": checkpoint.family.model_class,
        "max_context": context,
        "vocab_size": checkpoint.vocab_size,
        "num_parameters": weights.num_parameters,
        "weights": {
            "layout": weights.layout,
            "num_shards": weights.num_shards,
            "num_file_bytes": weights.num_file_bytes,
            "dtypes": list(weights.dtypes),
            "declared_dtype": declared_dtype(checkpoint.config) or None,
            "quantized_as": weights.quantized_as,
        },
        "prompt_format": {
            "name": prompt.name,
            "source": prompt.source,
            "roles": list(prompt.roles),
            "example": prompt.example,
            "stop_strings": list(prompt.stop_strings),
            "stop_tokens": {str(token_id): text for token_id, text in prompt.stop_tokens.items()},
        },
        "sampling_defaults": asdict(inspection.sampling_defaults),
        "memory": {
            label: {
                "weights": weights.weight_bytes(dtype, quantization).total(),
                "kv_cache_per_token": weights.cache_bytes(dtype, 1),
                "kv_cache_full_context": weights.cache_bytes(dtype, context),
            }
            for label, dtype, quantization in forms(inspection)
        },
    }


def as_lines(inspection: Inspection) -> Iterator[str]:
    """The facts for a person."""
    checkpoint, weights, prompt = inspection.checkpoint, inspection.footprint, inspection.prompt_format
    shards = "1 file" if weights.num_shards == 1 else f"{weights.num_shards} shards"
    yield _row("model", f"{checkpoint.name} in {checkpoint.path}")
    yield _row("family", f"{checkpoint.family.name} (computed by transformers' {checkpoint.family.model_class})")
    yield _row("parameters", f"{weights.num_parameters:,} in {', '.join(weights.dtypes)}")
    if weights.quantized_as is not None:
        yield _row("quantized", f"the Linears are {weights.quantized_as} on disk, and stay so whatever --dtype is")
    yield _row("weights", f"{size_text(weights.num_file_bytes)} in {shards} ({weights.layout})")
    yield _row("context", f"{checkpoint.max_context:,} tokens, prompt and answer together")
    yield _row("prompt format", f"{prompt.name} (from {prompt.source})")
    if prompt.example is None:
        yield _row("", "chat is refused without one; choose it with --conv-template. Completions work.")
    else:
        yield _row("", f"{json.dumps(prompt.example, ensure_ascii=False)}")
        yield _row("", f"labels {prompt.roles[0]} and {prompt.roles[1]}")
    stops = [f"{text or 'no text'} ({token_id})" for token_id, text in prompt.stop_tokens.items()]
    yield _row("ends of answers", ", ".join([*stops, *map(repr, prompt.stop_strings)]) or "none known")
    yield _row("sampling", ", ".join(f"{name} {value}" for name, value in asdict(inspection.sampling_defaults).items()))
    yield _row("loading takes", "")
    for label, dtype, quantization in forms(inspection):
        yield _row(f"  {label}", _memory_text(inspection, dtype, quantization))
    yield _row("  --dtype auto", f"{_gpu_dtype(inspection)} on a GPU, {_cpu_dtype(inspection)} on this CPU")
    plan = f"fastchat plan {shlex.quote(str(checkpoint.path))}"
    yield _row("", f"`{plan}` says whether it fits, with the KV cache and everything else;")
    yield _row("", "models that do not fit together take turns in memory")


def forms(inspection: Inspection) -> Iterator[tuple[str, FloatName, Quantization | None]]:
    """The forms that the weights can be held in: a label, the number type, and how the Linears are quantized."""
    for dtype in _FLOATS:
        yield dtype, dtype, None
    for name in _QUANTIZED:
        yield name, _cpu_dtype(inspection), Quantization(name)


def _memory_text(inspection: Inspection, dtype: FloatName, quantization: Quantization | None) -> str:
    footprint = inspection.footprint
    full = footprint.cache_bytes(dtype, inspection.checkpoint.max_context)
    return (
        f"{size_text(footprint.weight_bytes(dtype, quantization).total())} for the weights, "
        f"{footprint.cache_bytes(dtype, 1):,} bytes of KV cache per token, {size_text(full)} for a full context"
    )


def _gpu_dtype(inspection: Inspection) -> FloatName:
    return _auto_dtype(inspection, "cuda")


def _cpu_dtype(inspection: Inspection) -> FloatName:
    return _auto_dtype(inspection, "cpu")


def _auto_dtype(inspection: Inspection, device: str) -> FloatName:
    stored = inspection.footprint.stored_dtype
    return choose_dtype("auto", device=device, config=inspection.checkpoint.config, stored=stored)


def _row(label: str, text: str) -> str:
    return f"{label:<17} {text}".rstrip()


if __name__ == "__main__":
    run_command(main)
