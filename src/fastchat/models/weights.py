"""A checkpoint's weights, into transformers' own class: one tensor at a time, each converted and freed.

The module is built without memory (on the meta device); each tensor is then read from a mapped file, copied into a
parameter of the wanted type on the wanted device, and dropped. So loading needs the weights once, plus one tensor.
Called by a worker, which hands the module to its engine; nothing here knows of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.precision import DTypeName, choose_dtype
from fastchat.models.progress import show_progress
from fastchat.models.recognition import recognise
from fastchat.models.weight_files import Shard, WeightFiles, find_weight_files, missing_tensor_error

logger = logging.getLogger(__name__)

OUTPUT_WEIGHT = "lm_head.weight"
MIN_TORCH_FOR_BIN = (2, 10)
"""Before this release the `weights_only` reader could be made to corrupt memory (CVE-2026-24747)."""


class TensorReader(Protocol):
    """An open shard."""

    def names(self) -> list[str]:
        """The tensors in it."""

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, backed by the file."""


def load_model(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    dtype: DTypeName = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> transformers.PreTrainedModel:
    """The module of a checkpoint, in eval(), without gradients, its weights of one type on one device.

    `on_progress(num_loaded, num_shards)` is called before the first shard and after each one; without it a bar or log
    lines say the same. Raises `CheckpointError` in one line for a file or tensor that is not as it must be.
    """
    files = find_weight_files(checkpoint.path)
    first = files.shards[0]
    with open_shard(files, first) as reader:
        names = reader.names()
        if not names:
            raise CheckpointError(f"{first.path}: holds no tensors; download it again")
        stored_dtype = reader.read(names[0]).dtype
    chosen = choose_dtype(dtype, device=device, config=checkpoint.config, stored=stored_dtype)
    module = build_empty_module(checkpoint)
    filler = _Filler(checkpoint, module, torch.device(device), chosen)
    filler.check_names(files)
    progress = nullcontext(on_progress) if on_progress is not None else show_progress(len(files.shards))
    with progress as report, torch.no_grad():
        report(0, len(files.shards))
        for num_loaded, shard in enumerate(files.shards, start=1):
            with open_shard(files, shard) as reader:
                filler.fill_from(shard, reader)
            report(num_loaded, len(files.shards))
        filler.finish()
    module.config.dtype = chosen
    return module.requires_grad_(requires_grad=False).eval()


def build_empty_module(checkpoint: Checkpoint) -> transformers.PreTrainedModel:
    """transformers' class for a checkpoint on the meta device: shapes without memory."""
    family = checkpoint.family
    recognised = recognise(checkpoint)
    options = family.map_config(checkpoint.config, recognised.format_name if recognised else None)
    try:
        config = getattr(transformers, family.config_class).from_dict(options)
        with torch.device("meta"):
            return getattr(transformers, family.model_class)(config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, RuntimeError) as error:
        raise _config_error(checkpoint, error) from error
    except Exception as error:
        # huggingface_hub's validation errors derive from Exception alone, and have moved between its releases
        if "Strict" not in type(error).__name__:
            raise
        raise _config_error(checkpoint, error) from error


@contextmanager
def open_shard(files: WeightFiles, shard: Shard) -> Iterator[TensorReader]:
    """Open one file of weights; its tensors must not be used after."""
    if files.format == "bin":
        yield _BinReader(shard.path)
        return
    from safetensors import SafetensorError, safe_open  # not needed where the weights are `.bin`

    try:
        with safe_open(shard.path, framework="pt", device="cpu") as handle:
            yield _SafetensorsReader(handle)
    except SafetensorError as error:
        raise CheckpointError(f"{shard.path}: cannot be read ({error}); download this file again") from error


class _SafetensorsReader:
    def __init__(self, handle: Any) -> None:  # Any: safetensors has no types
        self._handle = handle

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor


class _BinReader:
    """A `.bin` file through torch's restricted reader, mapped: no code of the file runs, no byte is copied yet."""

    def __init__(self, file: Path) -> None:
        version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
        if version < MIN_TORCH_FOR_BIN:
            raise CheckpointError(
                f"{file}: .bin weights are read with torch 2.10 or later only (this is {torch.__version__}); "
                "upgrade torch, or use a checkpoint in safetensors"
            )
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            # torch raises what the archive makes it raise: pickle errors, RuntimeError, OSError, KeyError, ...
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{file}: torch's weights_only reader refuses it ({reason}); download it again, or use safetensors"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
            raise CheckpointError(f"{file}: holds something else than named tensors; use a checkpoint in safetensors")
        self._tensors: dict[str, torch.Tensor] = content

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class _Filler:
    """Fills an empty module. `_waiting` holds the parameters that have no value yet, with their shapes."""

    def __init__(
        self, checkpoint: Checkpoint, module: transformers.PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._checkpoint = checkpoint
        self._module = module
        self._device = device
        self._dtype = dtype
        self._is_tied = bool(module.config.tie_word_embeddings)
        self._waiting = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._filled: set[str] = set()

    def check_names(self, files: WeightFiles) -> None:
        """Missing and unexpected tensors, before anything is loaded, where the files say what is in them."""
        names = files.tensor_names
        if names is None:
            return
        for shard in files.shards:
            for name in shard.tensor_names or ():
                self._targets(name, shard.path)
        held = {target for name in names for target in self._checkpoint.family.rename(name)}
        self._check_complete(held)

    def fill_from(self, shard: Shard, reader: TensorReader) -> None:
        """Every parameter that one shard holds."""
        names = reader.names()
        absent = sorted(set(shard.tensor_names or ()) - set(names))
        if absent:
            raise missing_tensor_error(shard.path, absent[0])
        for name in names:
            targets = self._targets(name, shard.path)
            if targets:
                self._fill(name, shard.path, reader.read(name), targets)

    def finish(self) -> None:
        """What no file holds: the tied output and the rotary frequencies."""
        self._check_complete(self._filled)
        if self._is_tied:
            self._tie()
        for parent_name, child in list(self._module.named_modules()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                self._rebuild(parent_name, child)
        left = [name for name, value in _tensors_of(self._module) if value.is_meta]
        if left:
            raise UnsupportedModelError(f"{self._checkpoint.path}: the values of {left[0]} are in no file")

    def _targets(self, name: str, file: Path) -> tuple[str, ...]:
        """The parameters that a tensor holds, each of them known."""
        targets = self._checkpoint.family.rename(name)
        for target in targets:
            if target not in self._waiting:
                raise CheckpointError(_unexpected_message(name, file, self._checkpoint.family.name))
        return targets

    def _fill(self, name: str, file: Path, source: torch.Tensor, targets: tuple[str, ...]) -> None:
        """Copy `source`, whose rows are those of `targets` one after the other."""
        if not source.is_floating_point() or source.element_size() < 2:
            raise UnsupportedModelError(
                f"{file}: {name} is of type {str(source.dtype).removeprefix('torch.')}: the checkpoint is quantized, "
                "which is not read here; use the original float16 or bfloat16 weights"
            )
        shapes = [self._waiting[target] for target in targets]
        expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        if tuple(source.shape) != expected:
            raise CheckpointError(
                f"{file}: {name} has the shape {_shape(source.shape)}, but config.json asks for {_shape(expected)}; "
                "config and weights are of different models, download them again"
            )
        if not self._filled.isdisjoint(targets):
            raise CheckpointError(
                f"{file}: {name} is in another weight file as well; the files are of different downloads, download "
                "them again"
            )
        start = 0
        for target, shape in zip(targets, shapes, strict=True):
            value = torch.empty(shape, dtype=self._dtype, device=self._device)
            value.copy_(source[start : start + shape[0]])
            parent_name, _, leaf = target.rpartition(".")
            setattr(self._module.get_submodule(parent_name), leaf, nn.Parameter(value, requires_grad=False))
            self._filled.add(target)
            start += shape[0]

    def _check_complete(self, held: set[str]) -> None:
        missing = sorted(set(self._waiting) - held - ({OUTPUT_WEIGHT} if self._is_tied else set()))
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: the weights lack {missing[0]}{others}; download the weight files again"
            )

    def _tie(self) -> None:
        """Share input and output embedding, but where a checkpoint holds two different ones (as transformers does)."""
        embedding = self._module.get_input_embeddings().weight
        output = self._module.get_output_embeddings()
        if OUTPUT_WEIGHT in self._filled and not torch.equal(output.weight, embedding):
            logger.warning("input and output embeddings differ, so they are not tied path=%s", self._checkpoint.path)
            return
        output.weight = embedding

    def _rebuild(self, name: str, child: nn.Module) -> None:
        """Make a module of computed buffers anew with real memory: in float32, whatever the weights are."""
        if next(child.parameters(), None) is not None:
            raise UnsupportedModelError(f"{self._checkpoint.path}: {name} has buffers that no file holds")
        # The rotary embeddings of all families take the model's config.
        fresh = type(child)(self._module.config)
        parent_name, _, leaf = name.rpartition(".")
        setattr(self._module.get_submodule(parent_name), leaf, fresh.to(self._device))


def _tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _shape(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(str(size) for size in shape) or "of a single number"


def _unexpected_message(name: str, file: Path, family: str) -> str:
    if "prefix_encoder" in name:
        return f"{file}: {name} belongs to a P-tuning prefix encoder, which does not run here; use the base checkpoint"
    if name.endswith(("weight_scale", ".scales", ".qweight", ".qzeros", ".absmax", ".weight_scale_inv", ".SCB")):
        return (
            f"{file}: {name} belongs to quantized weights, which are not read here; "
            "use the original float16 or bfloat16 weights"
        )
    return f"{file}: unexpected tensor {name}, which a {family} model of this config.json does not have; download again"


def _config_error(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{checkpoint.path / 'config.json'}: transformers refuses it ({reason}); correct the file")
