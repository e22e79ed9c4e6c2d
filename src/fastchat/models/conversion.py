"""Writes a checkpoint anew, in safetensors and smaller if asked, so that it loads without that work. Streams tensors.

Names stay those of the source. A Linear is quantized as on load, by the same code from the same values, and written as
`weight` and `weight_scale` in the form that it is held in (`quantized_parts.py`), so the model computes the same bits.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastchat.errors import CheckpointError, ConfigError
from fastchat.models.chat_template import TEMPLATE_FOLDER, load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.quantize import quantize_int4, quantize_int8
from fastchat.models.quantized_parts import SCALE_SUFFIX
from fastchat.models.recognition import FOLDER_SOURCE
from fastchat.models.safetensors_writer import TensorSpec, write_safetensors
from fastchat.models.stored_form import (
    FLOAT_BYTES,
    FloatName,
    Quantization,
    StoredForm,
    fitting_group,
    form_of,
    padded_inputs,
)
from fastchat.models.stored_quantization import choose_quantization, own_marker, stored_quantization
from fastchat.models.tokenizer import load_tokenizer
from fastchat.models.weight_files import Shard, WeightFiles, find_weight_files, tensor_twice_error
from fastchat.models.weights import check_tensor_names, open_shard

DEFAULT_SHARD_BYTES = 5 * 10**9
WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf"})
INDEX_SUFFIX = ".index.json"
CPU = torch.device("cpu")
DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in FLOAT_BYTES}


@dataclass(frozen=True, slots=True)
class Converted:
    """What was written."""

    num_bytes: int
    num_shards: int


@dataclass(frozen=True, slots=True)
class _Item:
    """One tensor of the source and what becomes of it."""

    shard: Shard
    name: str
    form: StoredForm | None
    """None: it stays as it is."""
    outputs: tuple[TensorSpec, ...]

    @property
    def num_bytes(self) -> int:
        return sum(output.num_bytes for output in self.outputs)


def check_destination(folder: Path) -> None:
    """Raise `ConfigError` unless a checkpoint can be written there without touching what exists."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: exists and is not an empty folder; give a new one.")


def convert_checkpoint(
    checkpoint: Checkpoint,
    destination: Path,
    *,
    quantization: Quantization | None = None,
    dtype: FloatName | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda _num_done, _num_all: None,
) -> Converted:
    """Write `checkpoint` into the folder `destination`, whole or not at all.

    `dtype` is that of what is not quantized, None for what it is. A file has at most `max_shard_bytes`, but for a
    single tensor that has more. `on_progress` is told bytes. Raises `CheckpointError` or `ConfigError`.
    """
    check_destination(destination)
    asked = choose_quantization(checkpoint.config, quantization)
    check_tensor_names(checkpoint)
    files = find_weight_files(checkpoint.path)
    items = list(_plan(checkpoint, files, asked, dtype))
    shards = _split(items, max_shard_bytes)
    num_bytes = sum(item.num_bytes for item in items)
    with _complete_or_nothing(destination, num_bytes) as folder:
        _copy_small_files(checkpoint.path, folder)
        _write_json(folder / "config.json", _config(checkpoint, asked, dtype))
        _write_weights(folder, files, shards, on_progress)
    return Converted(num_bytes, len(shards))


def _plan(
    checkpoint: Checkpoint, files: WeightFiles, quantization: Quantization | None, dtype: FloatName | None
) -> Iterator[_Item]:
    """What becomes of every tensor, in the order of the files."""
    seen: set[str] = set()
    for shard in files.shards:
        with open_shard(files, shard) as reader:
            for name in reader.names():
                if name in seen:
                    raise tensor_twice_error(shard.path, name)
                seen.add(name)
                source = reader.read(name)
                form = _form(checkpoint, name, source, quantization, dtype)
                yield _Item(shard, name, form, _outputs(name, source, form))


def _form(
    checkpoint: Checkpoint, name: str, source: Tensor, quantization: Quantization | None, dtype: FloatName | None
) -> StoredForm | None:
    targets = checkpoint.family.rename(name)
    if not targets or name.endswith(SCALE_SUFFIX) or not source.is_floating_point():
        return None
    form = form_of(targets[0], source.shape, dtype or "float32", quantization)
    return None if dtype is None and form.name in DTYPES else form


def _outputs(name: str, source: Tensor, form: StoredForm | None) -> tuple[TensorSpec, ...]:
    if form is None:
        return (TensorSpec(name, source.dtype, tuple(source.shape)),)
    if form.name in DTYPES:
        return (TensorSpec(name, DTYPES[form.name], tuple(source.shape)),)
    num_rows, num_inputs = source.shape
    scale_name = name + SCALE_SUFFIX
    if form.name == "int8":
        return (
            TensorSpec(name, torch.int8, (num_rows, num_inputs)),
            TensorSpec(scale_name, torch.float32, (num_rows,)),
        )
    num_padded = padded_inputs(num_inputs)
    num_groups = num_padded // fitting_group(num_inputs, form.group_size)
    return (
        TensorSpec(name, torch.uint8, (num_rows, num_padded // 2)),
        TensorSpec(scale_name, torch.float32, (num_rows, num_groups)),
    )


def _convert(source: Tensor, form: StoredForm | None) -> tuple[Tensor, ...]:
    if form is None:
        return (source,)
    if form.name in DTYPES:
        return (source.to(DTYPES[form.name]),)
    if form.name == "int8":
        return quantize_int8(source, CPU)
    return quantize_int4(source, form.group_size, CPU)


def _split(items: list[_Item], max_shard_bytes: int) -> list[list[_Item]]:
    """The items of each file; a weight stays together with its scales."""
    shards: list[list[_Item]] = [[]]
    num_bytes = 0
    for item in items:
        if shards[-1] and num_bytes + item.num_bytes > max_shard_bytes:
            shards.append([])
            num_bytes = 0
        shards[-1].append(item)
        num_bytes += item.num_bytes
    return shards


def _write_weights(
    folder: Path, files: WeightFiles, shards: list[list[_Item]], on_progress: Callable[[int, int], None]
) -> None:
    num_all = sum(item.num_bytes for shard in shards for item in shard)
    num_done = 0
    on_progress(0, num_all)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [output for item in shard for output in item.outputs]
        weight_map |= dict.fromkeys((spec.name for spec in specs), file_name)
        with write_safetensors(folder / file_name, specs) as writer:
            for item, source in _read(files, shard):
                try:
                    tensors = _convert(source, item.form)
                except CheckpointError as error:
                    raise CheckpointError(f"{item.shard.path}: {item.name}: {error.message}") from None
                for tensor in tensors:
                    writer.write(tensor)
                num_done += item.num_bytes
                on_progress(num_done, num_all)
    if len(shards) > 1:
        index = {"metadata": {"total_size": num_all}, "weight_map": weight_map}
        _write_json(folder / "model.safetensors.index.json", index)


def _read(files: WeightFiles, items: list[_Item]) -> Iterator[tuple[_Item, Tensor]]:
    """The sources of items, each file of theirs opened once."""
    for path in dict.fromkeys(item.shard.path for item in items):
        of_file = [item for item in items if item.shard.path == path]
        with open_shard(files, of_file[0].shard) as reader:
            for item in of_file:
                yield item, reader.read(item.name)


def _config(
    checkpoint: Checkpoint, quantization: Quantization | None, dtype: FloatName | None
) -> Mapping[str, Any]:  # Any: JSON
    config = dict(checkpoint.config)
    if dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = dtype
    if quantization is not None:
        stored = stored_quantization(checkpoint.config)
        config["quantization_config"] = own_marker(stored.quantization if stored else quantization)
        config.pop("quantization_bit", None)
    source = load_chat_format(checkpoint, load_tokenizer(checkpoint)).source
    if source.startswith(FOLDER_SOURCE):
        config["_name_or_path"] = checkpoint.name  # the new folder may be called otherwise
    return config


def _copy_small_files(source: Path, folder: Path) -> None:
    """Everything that is neither weights nor hidden: tokenizer, templates, generation settings, licence."""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(INDEX_SUFFIX)
        if file.is_file() and not is_weights and not file.name.startswith(".") and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    if (source / TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / TEMPLATE_FOLDER, folder / TEMPLATE_FOLDER)


@contextmanager
def _complete_or_nothing(destination: Path, num_bytes: int) -> Iterator[Path]:
    """A folder beside `destination` that takes its name when the block ends well, and is removed otherwise."""
    parent = destination.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = _make_folder(destination, num_bytes)
        with _removed_on_error(folder):
            yield folder
            check_destination(destination)
            folder.replace(destination)
    except OSError as error:
        raise ConfigError(f"{destination}: cannot be written ({error.strerror or error}).") from error


def _make_folder(destination: Path, num_bytes: int) -> Path:
    parent = destination.absolute().parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise ConfigError(f"{parent}: {num_bytes:,} bytes are needed there and {free:,} are free; make room.")
    folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    folder.chmod(0o755)
    return folder


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_json(file: Path, content: Mapping[str, Any]) -> None:  # Any: JSON
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
