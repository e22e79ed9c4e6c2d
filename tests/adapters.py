"""Small random LoRA adapters as PEFT writes them, and the checkpoints that they make when merged into their base."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import write_weights

LLAMA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
GLM_MODULES = ("q_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
CHATGLM_MODULES = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")


def modules_of(family: str) -> tuple[str, ...]:
    """What an adapter of a family may change, as its files name it."""
    if family.startswith("chatglm"):
        return CHATGLM_MODULES
    return GLM_MODULES if family == "glm" else LLAMA_MODULES


def base_tensors(base: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint in safetensors."""
    return {name: value for file in sorted(base.glob("*.safetensors")) for name, value in load_file(file).items()}


def write_lora(
    folder: Path,
    base: Path,
    modules: Sequence[str],
    *,
    seed: int = 1,
    rank: int = 4,
    strength: float = 0.6,
    **config: object,
) -> dict[str, Tensor]:
    """Write an adapter of `base` into `folder` and return what it adds to which weight, by the name on disk."""
    folder.mkdir(parents=True)
    options = {"r": rank, "lora_alpha": 2 * rank, **config}
    generator = torch.Generator().manual_seed(seed)
    changes, tensors = {}, {}
    for name, weight in base_tensors(base).items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] not in modules or weight.dim() != 2:
            continue
        own_rank = (options.get("rank_pattern") or {}).get(module.rpartition(".")[2], rank)
        alpha = (options.get("alpha_pattern") or {}).get(module.rpartition(".")[2], options["lora_alpha"])
        scale = alpha / own_rank**0.5 if options.get("use_rslora") else alpha / own_rank
        down = torch.randn(own_rank, weight.shape[1], generator=generator) / weight.shape[1] ** 0.5
        up = strength * torch.randn(weight.shape[0], own_rank, generator=generator) / scale / own_rank**0.5
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
        changes[name] = scale * up @ down
    assert changes, "nothing was changed"
    save_file(tensors, folder / "adapter_model.safetensors")
    write_lora_config(folder, {"base_model_name_or_path": str(base), "target_modules": list(modules), **options})
    return changes


def write_lora_config(folder: Path, options: Mapping[str, object]) -> None:
    """adapter_config.json with the entries that PEFT always writes."""
    config = {
        "auto_mapping": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.05,
        "modules_to_save": None,
        "peft_type": "LORA",
        "rank_pattern": {},
        "alpha_pattern": {},
        "revision": None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
        **options,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def write_merged(folder: Path, base: Path, changes: Mapping[str, Tensor]) -> Path:
    """The checkpoint that is `base` with the changes added to its weights."""
    folder.mkdir(parents=True)
    for file in base.iterdir():
        if "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: value + changes[name] if name in changes else value for name, value in base_tensors(base).items()}
    write_weights(folder, tensors, 1, "safetensors")
    return folder
