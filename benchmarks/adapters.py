"""What adapters and shared weights cost: 8 LoRA adapters on one base, and a fine-tune that shares all but four layers.

    python benchmarks/adapters.py                      a 0.5B Qwen2 shape in bfloat16, rank 16 on every linear
    python benchmarks/adapters.py --quantize int8      the same over an int8 base
    python benchmarks/adapters.py --json /tmp/a.json

Writes about 1.6 GB of random checkpoints into a folder that is removed. Throughput is measured in alternation, the base
alone and then a batch of as many streams that takes every adapter in turn; the ratio is that of the medians.
`--clock cpu` counts the process's own time, which says more where others use the machine too.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.adapters import ModelAdapters
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.shared_tensors import PROCESS_TENSORS
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import build_empty_module, load_model

SHAPE: dict[str, object] = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NUM_OWN_LAYERS = 4


def write_base(folder: Path) -> Path:
    """A random checkpoint in bfloat16."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    module = build_empty_module(Checkpoint.open(folder))
    tensors = {name: _random(name, value.shape) for name, value in module.named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_tuned(folder: Path, base: Path) -> Path:
    """The base with its last layers changed."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    num_layers = int(str(SHAPE["num_hidden_layers"]))
    own = [f".layers.{number}." for number in range(num_layers - NUM_OWN_LAYERS, num_layers)]
    with safe_open(base / "model.safetensors", framework="pt") as stored:
        tensors = {
            name: _random(name, stored.get_tensor(name).shape)
            if any(part in name for part in own)
            else stored.get_tensor(name)
            for name in stored.keys()  # noqa: SIM118 - safetensors' handle is no mapping
        }
    save_file(tensors, folder / "model.safetensors")
    return folder


def write_adapter(folder: Path, base: Path, rank: int) -> Path:
    """A random LoRA of every linear, as PEFT stores it."""
    folder.mkdir()
    tensors: dict[str, Tensor] = {}
    for name, parameter in build_empty_module(Checkpoint.open(base)).named_parameters():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in MODULES and parameter.dim() == 2:
            num_rows, num_inputs = parameter.shape
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, num_inputs) / num_inputs**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(num_rows, rank) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def load(folder: Path, quantization: Quantization | None) -> tuple[Checkpoint, nn.Module]:
    """A model as a worker holds it."""
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint, dtype="bfloat16", quantization=quantization, on_progress=lambda *_: None)
    make_lean(model)
    return checkpoint, model


def held_bytes(*models: nn.Module) -> int:
    """Memory of the parameters, each piece counted once."""
    storages = [parameter.untyped_storage() for model in models for parameter in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def measure_sharing(base: Path, tuned: Path, quantization: Quantization | None) -> dict[str, float]:
    """Two checkpoints in one process."""
    (_, first), (_, second) = load(base, quantization), load(tuned, quantization)
    together, apart = held_bytes(first, second), held_bytes(first) + held_bytes(second)
    return {"apart_mb": apart / 1e6, "shared_mb": together / 1e6, "saved_mb": PROCESS_TENSORS.saved_bytes / 1e6}


def tokens_per_second(
    engine: Engine, names: Sequence[str], num_tokens: int, seed: int, clock: Callable[[], float]
) -> float:
    """Decoding of one stream for each name, prompts of 32 tokens computed before the clock starts."""
    generator = torch.Generator().manual_seed(seed)
    for number, name in enumerate(names):
        prompt = torch.randint(0, 32000, (32,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=num_tokens + 1, temperature=0.0)
        engine.add(SequenceRequest(f"{seed}-{number}", tuple(prompt), sampling, adapter=name))
    waiting = set(range(len(names)))
    while waiting:
        waiting -= {int(event.sequence_id.split("-")[1]) for event in engine.step()}
    began_at, num_events = clock(), 0
    while engine.has_work:
        num_events += len(engine.step())
    return num_events / (clock() - began_at)


def measure_throughput(engine: Engine, arguments: argparse.Namespace, names: Sequence[str]) -> dict[str, float]:
    """The base alone against all adapters mixed, in alternation."""
    streams = arguments.streams
    kinds = {"base": [""] * streams, "mixed": [names[number % len(names)] for number in range(streams)]}
    speeds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(arguments.repeats + 1):
        for kind, adapters in kinds.items():
            clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
            speed = tokens_per_second(engine, adapters, arguments.tokens, 2 * turn + (kind == "mixed"), clock)
            speeds[kind] += [speed] if turn else []  # the first turn warms up
    medians = {kind: statistics.median(values) for kind, values in speeds.items()}
    return {**medians, "ratio": medians["mixed"] / medians["base"]}


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Each result with its name."""
    quantization = Quantization(arguments.quantize) if arguments.quantize else None
    base = write_base(folder / "base")
    yield "fine-tune, all but 4 layers shared", measure_sharing(base, write_tuned(folder / "t", base), quantization)
    gc.collect()
    checkpoint, model = load(base, quantization)
    engine = Engine(model, EngineConfig(max_context=512, kv_cache_bytes=2**28), ModelAdapters(model, checkpoint))
    names = [f"adapter-{number}" for number in range(arguments.adapters)]
    sizes = [
        engine.adapters.add(name, str(write_adapter(folder / name, base, arguments.rank))).change.num_bytes
        for name in names
    ]
    yield "one adapter", {"mb": sizes[0] / 1e6, "share_of_base": sizes[0] / held_bytes(model)}
    yield f"{arguments.streams} streams, tokens/s", measure_throughput(engine, arguments, names)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--quantize", choices=["int8", "int4"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    SHAPE["num_hidden_layers"] = arguments.layers
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for name, figures in measure(arguments, Path(folder)):
            results[name] = figures
            print(name, {key: round(value, 3) for key, value in figures.items()}, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


def _random(name: str, shape: Sequence[int]) -> Tensor:
    if "norm" in name:
        return torch.ones(*shape, dtype=torch.bfloat16)
    return (torch.randn(*shape) * (1.0 if "embed" in name else shape[-1] ** -0.5)).to(torch.bfloat16)


if __name__ == "__main__":
    main()
