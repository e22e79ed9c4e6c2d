"""A folder that changes another checkpoint, recognised by what it holds. Torch-free; read as text and never run.

    adapter_config.json + adapter_model.safetensors (or .bin)    LoRA, as PEFT writes it
    config.json with pre_seq_len + a prefix encoder and no model  ChatGLM2's P-tuning v2

What an option of the folder would change and is not computed here is refused by name, in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastchat.config import expand_home
from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.checkpoint import read_json_file, told_if_unreadable
from fastchat.models.stored_tensors import read_stored_tensors
from fastchat.models.weight_files import LAYOUTS, WeightFiles, WeightFormat, find_weight_files

CONFIG_FILE = "adapter_config.json"
WEIGHT_LAYOUTS: tuple[tuple[str, WeightFormat], ...] = (
    ("adapter_model.safetensors", "safetensors"),
    ("adapter_model.bin", "bin"),
)
PREFIX_MARK = "prefix_encoder."
MERGE = "merge it into its base model"

_WITHOUT_EFFECT = frozenset(
    {
        # Which modules were trained: the tensors in the file say it.
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        # For training, or for merging into the base.
        "lora_dropout",
        "inference_mode",
        "fan_in_fan_out",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "ensure_weight_tying",
        # Where it comes from.
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "task_type",
        "peft_type",
    }
)
_OBEYED = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "init_lora_weights"})
_INITS_THAT_KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal")
"""The others (pissa, olora, loftq, ...) move a part of the base's weights into the adapter."""
_MAX_NUMBER = 1e6


@dataclass(frozen=True)
class AdapterFolder:
    """A LoRA folder; `config` is its raw adapter_config.json, whose options have been checked."""

    path: Path
    config: Mapping[str, Any]  # Any: JSON as it is on disk

    @cached_property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @cached_property
    def base_name(self) -> str:
        """The base that it was trained on, a folder or a published name; "" where it does not say."""
        name = self.config.get("base_model_name_or_path")
        return name.strip() if isinstance(name, str) else ""

    @property
    def num_slots(self) -> int:
        """It takes none of the KV cache in front of a sequence."""
        return 0

    @cached_property
    def files(self) -> WeightFiles:
        """Its weights. Raises `CheckpointError`."""
        return find_weight_files(self.path, WEIGHT_LAYOUTS)

    @cached_property
    def num_values(self) -> int:
        """The numbers that are held for it, from the header alone."""
        return sum(
            each.num_values
            for shard in self.files.shards
            for each in read_stored_tensors(self.files.format, shard.path)
        )

    def scale_of(self, module: str, rank: int) -> float:
        """What the product of a module's two matrices is multiplied by. Raises `CheckpointError`."""
        wanted = self._number("r", module, "rank_pattern")
        if wanted != rank:
            raise CheckpointError(
                f"{self.path}: {module} has the rank {rank}, but {CONFIG_FILE} says {wanted:g}; config and weights are "
                "of different adapters, download them again"
            )
        alpha = self._number("lora_alpha", module, "alpha_pattern")
        return alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank

    def _number(self, key: str, module: str, pattern_key: str) -> float:
        """The first pattern that is the end of the module's name, in whole words, else the common value."""
        patterns = self.config.get(pattern_key) or {}
        value = self.config.get(key, 8)
        try:
            for pattern, own in dict(patterns).items():
                if re.fullmatch(rf"(.*\.)?({pattern})", module):
                    value = own
                    break
        except (re.error, TypeError, ValueError):
            raise CheckpointError(f"{self.path / CONFIG_FILE}: {pattern_key} cannot be read; correct it") from None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= _MAX_NUMBER:
            raise CheckpointError(f"{self.path / CONFIG_FILE}: {key} is {value!r}, not a positive number; correct it")
        return float(value)


@dataclass(frozen=True)
class PrefixFolder:
    """A folder with a trained prefix; `config` is its raw config.json, that of its base with two entries more."""

    path: Path
    config: Mapping[str, Any]  # Any: JSON as it is on disk

    @cached_property
    def name(self) -> str:
        """The folder's name."""
        return self.path.absolute().name

    @cached_property
    def base_name(self) -> str:
        """The base that it was trained on, as `AdapterFolder.base_name`."""
        name = self.config.get("_name_or_path")
        return name.strip() if isinstance(name, str) else ""

    @cached_property
    def files(self) -> WeightFiles:
        """Its weights. Raises `CheckpointError`."""
        return find_weight_files(self.path)

    @property
    def num_slots(self) -> int:
        """The slots of the KV cache that it takes in front of every sequence."""
        return int(self.config["pre_seq_len"])

    @property
    def has_projection(self) -> bool:
        """Whether its values are computed from an embedding, and not the embedding itself."""
        return bool(self.config.get("prefix_projection"))

    @cached_property
    def num_values(self) -> int:
        """The numbers that are held for it, from the header alone."""
        stored = (each for shard in self.files.shards for each in read_stored_tensors(self.files.format, shard.path))
        return sum(each.num_values for each in stored if each.name.endswith("embedding.weight"))


AnyAdapter = AdapterFolder | PrefixFolder


def find_adapter(path: Path) -> AnyAdapter | None:
    """The adapter in a folder, None where it holds none, or a whole model beside it. Raises `CheckpointError`."""
    path = expand_home(path)
    with told_if_unreadable(path):
        has_weights = any((path / name).is_file() for name, _ in LAYOUTS)
        config = read_json_file(path / CONFIG_FILE)
    if config is not None and not has_weights:
        _check_options(path / CONFIG_FILE, config)
        return AdapterFolder(path, config)
    return _find_prefix(path) if has_weights else None


def _find_prefix(path: Path) -> PrefixFolder | None:
    config = read_json_file(path / "config.json") or {}
    num_slots = config.get("pre_seq_len")
    if not isinstance(num_slots, int) or isinstance(num_slots, bool) or not 0 < num_slots <= _MAX_NUMBER:
        return None
    folder = PrefixFolder(path, config)
    shards = folder.files.shards
    names = [each.name for shard in shards for each in read_stored_tensors(folder.files.format, shard.path)]
    return folder if names and all(PREFIX_MARK in name for name in names) else None


def _check_options(file: Path, config: Mapping[str, Any]) -> None:  # Any: JSON as it is on disk
    """Raise `UnsupportedModelError` for the first option that would change the result and is not computed here."""

    def refuse(fact: str, remedy: str = MERGE) -> UnsupportedModelError:
        return UnsupportedModelError(f"{file}: {fact}, which does not run here as an adapter; {remedy}")

    kind = config.get("peft_type")
    if kind != "LORA":
        raise refuse(f"peft_type is {kind!r}")
    if config.get("bias") not in (None, "none"):
        raise refuse(f"bias is {config['bias']!r}: biases were trained too")
    init = config.get("init_lora_weights")
    if init not in _INITS_THAT_KEEP_THE_BASE:
        raise refuse(
            f"init_lora_weights is {init!r}: a part of the base's weights is in the adapter",
            "save it as a plain LoRA (PEFT: path_initial_model_for_weight_conversion), or merge it",
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise refuse(f"task_type is {config['task_type']!r}")
    for name, value in config.items():
        if value and name not in _WITHOUT_EFFECT | _OBEYED:
            raise refuse(f"{name} is set")
