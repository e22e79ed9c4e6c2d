"""A model's folder on disk, read as text and never run. Torch-free; everything in `models` starts from here.

The raw `config.json` is kept as it is on disk: transformers rewrites some of it (`_name_or_path`) on the way in, and
follows `auto_map` to code, which nothing here does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fastchat.config import expand_home
from fastchat.errors import CheckpointError
from fastchat.models.families import Family, find_family, rope_options, rope_type

MAX_STRETCHED = 1e9
"""Nothing that a rotary embedding counts is larger."""

GGUF_SUFFIX = ".gguf"
GGUF_HINT = "GGUF files are for llama.cpp; give the folder of the original model (config.json, tokenizer, safetensors)"
FOLDER_HINT = "give the folder that holds config.json and the weights"

HUB_ID_PARTS = 2
"""The hub's names are `owner/name`."""

CONTEXT_KEYS = ("seq_length", "max_position_embeddings", "max_sequence_length", "max_seq_len", "n_positions")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that holds a model of a known family; `config` is its raw config.json."""

    path: Path
    config: Mapping[str, Any]  # Any: JSON as it is on disk
    family: Family

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Read a folder's config.json. Raises `CheckpointError` in one line that names the file and the remedy."""
        path = expand_home(path)
        with told_if_unreadable(path):
            if not path.is_dir():
                raise CheckpointError(_no_folder_message(path))
            config = read_json_file(path / "config.json")
            if config is None:
                raise CheckpointError(_no_config_message(path))
        try:
            family = find_family(config)
        except CheckpointError as error:
            raise type(error)(f"{path}/{error.message}") from None
        return cls(path, config, family)

    @cached_property
    def name(self) -> str:
        """The folder's name; in a hub cache (`models--owner--name/snapshots/<hash>`) the model's."""
        path = self.path.absolute()
        repository = path.parent.parent.name
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.rsplit("--", 1)[-1]
        return path.name or path.resolve().name

    @cached_property
    def max_context(self) -> int:
        """The number of tokens that prompt and answer may have together."""
        for key in CONTEXT_KEYS:
            value = self.config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return self._stretched(value)
        raise CheckpointError(
            f"{self.path / 'config.json'}: no context length; add max_position_embeddings (a number of tokens)"
        )

    @cached_property
    def vocab_size(self) -> int:
        """The rows of the model's output, padding rows included."""
        for key in ("padded_vocab_size", "vocab_size"):
            value = self.config.get(key)
            if isinstance(value, int) and value > 0:
                return value
        raise CheckpointError(f"{self.path / 'config.json'}: no vocab_size; the file is not complete")

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:  # Any: JSON as it is on disk
        """tokenizer_config.json, empty where there is none."""
        return self.read_json("tokenizer_config.json") or {}

    @cached_property
    def generation_config(self) -> Mapping[str, Any]:  # Any: JSON as it is on disk
        """generation_config.json, empty where there is none."""
        return self.read_json("generation_config.json") or {}

    @cached_property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens with a role (`bos_token`, `eos_token`, ...) as the tokenizer's files name them."""
        merged = {**(self.read_json("special_tokens_map.json") or {}), **self.tokenizer_config}
        tokens: dict[str, str] = {}
        for key, value in merged.items():
            content = value.get("content") if isinstance(value, Mapping) else value
            if key.endswith("_token") and isinstance(content, str):
                tokens[key] = content
        return tokens

    def read_json(self, name: str) -> Mapping[str, Any] | None:  # Any: JSON as it is on disk
        """A JSON object of the folder, None where there is no such file."""
        return read_json_file(self.path / name)

    def read_text(self, name: str) -> str | None:
        """A text file of the folder, None where there is no such file. Text is read, never run."""
        file = self.path / name
        if not file.is_file():
            return None
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read as text ({error}); download it again") from None

    def _stretched(self, num_positions: int) -> int:
        """`linear` and `yarn` say by how much they stretch; the other kinds count it in already."""
        if rope_type(self.config) == "linear":
            return int(num_positions * self._rope_number("factor", 1.0))
        if rope_type(self.config) == "yarn":
            original = self._rope_number("original_max_position_embeddings", num_positions)
            return max(num_positions, int(original * self._rope_number("factor", 1.0)))
        return num_positions

    def _rope_number(self, name: str, default: float) -> float:
        value = rope_options(self.config).get(name) or default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_STRETCHED:
            raise CheckpointError(
                f"{self.path / 'config.json'}: {name} of the rotary embedding is {value!r}, not a positive number; "
                "download the file again"
            )
        return value


@contextmanager
def told_if_unreadable(path: Path) -> Iterator[None]:
    """Raise `CheckpointError` where the system lets this process not look at `path`, or at a file below it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or path}: cannot be read ({error.strerror}); let this process's user read it, or give "
            "another folder"
        ) from None


def read_json_file(file: Path) -> Mapping[str, Any] | None:  # Any: JSON as it is on disk
    """The object in a JSON file, None where there is no such file. Raises `CheckpointError` for anything else."""
    if not file.is_file():
        return None
    try:
        value = json.loads(file.read_bytes(), parse_constant=_finite, parse_float=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds no JSON object; download it again")
    return value


def _finite(text: str) -> float:
    """JSON knows neither NaN nor Infinity, though Python's reader does; as a size or a factor either would spread."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a number")
    return value


def _no_folder_message(path: Path) -> str:
    if path.is_file():
        return f"{path}: a file; {GGUF_HINT if path.suffix == GGUF_SUFFIX else FOLDER_HINT}"
    if path.is_absolute() or len(path.parts) != HUB_ID_PARTS:
        return f"{path}: no such folder; {FOLDER_HINT}"
    download = f"nothing is downloaded here: `hf download {path}` does that, and prints the folder"
    return f"{path}: no such folder; {FOLDER_HINT} ({download})"


def _no_config_message(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path}: an adapter (adapter_config.json) without a model; give its base, or merge it first"
    inner = sorted(folder.name for folder in path.iterdir() if (folder / "config.json").is_file())
    if inner:
        return f"{path}: no config.json here, but in its folder {inner[0]!r}; give that folder"
    if next(path.glob(f"*{GGUF_SUFFIX}"), None) is not None:
        return f"{path}: no config.json; {GGUF_HINT}"
    return f"{path}: no config.json; the folder is not a complete model, download it again"
