"""A checkpoint's weights, into transformers' own class: one tensor at a time, each converted and freed.

The module is built without memory (on the meta device); each tensor is then read from a mapped file, copied into a
parameter of the wanted type on the wanted device, or quantized there, and dropped. So loading needs the weights once,
in the form that they are held in, plus one tensor.
Called by a worker, which hands the module to its engine; nothing here knows of one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import nn

from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.precision import DTypeName, choose_dtype, warn_if_slow
from fastchat.models.progress import show_progress
from fastchat.models.quantized_linear import QuantizedLinear
from fastchat.models.quantized_parts import SCALE_SUFFIX, QuantizedParts
from fastchat.models.recognition import recognise
from fastchat.models.shared_tensors import PROCESS_TENSORS
from fastchat.models.stored_form import (
    OUTPUT_WEIGHT,
    FloatName,
    Quantization,
    StoredForm,
    form_of,
    is_linear_weight,
)
from fastchat.models.stored_quantization import REMEDY, choose_quantization, stored_quantization
from fastchat.models.weight_files import Shard, WeightFiles, find_weight_files, missing_tensor_error, tensor_twice_error

logger = logging.getLogger(__name__)

FLOAT_NAMES: Mapping[torch.dtype, FloatName] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
LINEAR_CLASSES = (nn.Linear, QuantizedLinear)
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
    quantization: Quantization | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> transformers.PreTrainedModel:
    """The module of a checkpoint, in eval(), without gradients, its weights of one type on one device.

    With `quantization`, or where the files are quantized, Linears are those of `quantized_linear.py` and the module's
    `held_as` is their form; what is computed outside of them is of the one type still.

    `on_progress(num_loaded, num_shards)` is called before the first shard and after each one; without it a bar or log
    lines say the same. Raises `CheckpointError` in one line for a file or tensor that is not as it must be, and
    `ConfigError` for a quantization that is not the one on disk.
    """
    quantization = choose_quantization(checkpoint.config, quantization)
    files = find_weight_files(checkpoint.path)
    first = files.shards[0]
    with open_shard(files, first) as reader:
        names = reader.names()
        if not names:
            raise CheckpointError(f"{first.path}: holds no tensors; download it again")
        stored = str(reader.read(names[0]).dtype).removeprefix("torch.")
    dtype_name = choose_dtype(dtype, device=device, config=checkpoint.config, stored=stored)
    warn_if_slow(dtype_name, device)
    chosen: torch.dtype = getattr(torch, dtype_name)
    module = build_empty_module(checkpoint)
    filler = _Filler(checkpoint, module, torch.device(device), chosen, quantization)
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
    module.held_as = filler.held_as
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


def check_tensor_names(checkpoint: Checkpoint) -> None:
    """Raise `CheckpointError` for missing and unexpected tensors, where the files say what is in them."""
    module = build_empty_module(checkpoint)
    _Filler(checkpoint, module, torch.device("meta"), torch.float32, None).check_names(
        find_weight_files(checkpoint.path)
    )


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
        self,
        checkpoint: Checkpoint,
        module: transformers.PreTrainedModel,
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None,
    ) -> None:
        self._checkpoint = checkpoint
        self._module = module
        self._device = device
        self._dtype = dtype
        self._quantization = quantization
        self._quantized = QuantizedParts(module, device)
        self._is_tied = bool(module.config.tie_word_embeddings)
        self._waiting = {name: parameter.shape for name, parameter in module.named_parameters(remove_duplicate=False)}
        self._filled: set[str] = set()

    @property
    def held_as(self) -> str:
        """The form of the Linears, or the type of all weights where none is quantized."""
        return self._quantized.held_as or FLOAT_NAMES[self._dtype]

    def check_names(self, files: WeightFiles) -> None:
        """Missing and unexpected tensors, before anything is loaded, where the files say what is in them."""
        names = files.tensor_names
        if names is None:
            return
        for shard in files.shards:
            for name in shard.tensor_names or ():
                self._targets(name, shard.path)
        weights = [name for name in names if not _is_scale(name)]
        held = {target for name in weights for target in self._checkpoint.family.rename(name)}
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
        self._check_quantized()
        if self._is_tied:
            self._tie()
        for parent_name, child in list(self._module.named_modules()):
            if any(buffer.is_meta for buffer in child.buffers(recurse=False)):
                self._rebuild(parent_name, child)
        left = [name for name, value in _tensors_of(self._module) if value.is_meta]
        if left:
            raise UnsupportedModelError(f"{self._checkpoint.path}: the values of {left[0]} are in no file")

    def _targets(self, name: str, file: Path) -> tuple[str, ...]:
        """The parameters that a tensor holds or scales, each of them known."""
        targets = self._checkpoint.family.rename(name.removesuffix(SCALE_SUFFIX) if _is_scale(name) else name)
        for target in targets:
            shape = self._waiting.get(target)
            if shape is None or (_is_scale(name) and not is_linear_weight(target, shape)):
                raise CheckpointError(_unexpected_message(name, file, self._checkpoint.family.name))
        return targets

    def _fill(self, name: str, file: Path, source: torch.Tensor, targets: tuple[str, ...]) -> None:
        """Take `source`, whose rows are those of `targets` one after the other."""
        is_scale = _is_scale(name)
        is_quantized = source.dtype in (torch.int8, torch.uint8) and all(
            is_linear_weight(target, self._waiting[target]) for target in targets
        )
        if not is_quantized and (not source.is_floating_point() or source.element_size() < 2):
            raise UnsupportedModelError(
                f"{file}: {name} is of type {str(source.dtype).removeprefix('torch.')}: the checkpoint is quantized in "
                f"a way that is not read here; {REMEDY}"
            )
        self._check_shape(name, file, source, targets, only_rows=is_quantized or is_scale)
        marks = {f"{target}{SCALE_SUFFIX}" for target in targets} if is_scale else set(targets)
        if not self._filled.isdisjoint(marks):
            raise tensor_twice_error(file, name)
        self._filled |= marks
        start = 0
        for target in targets:
            rows = source[start : start + self._waiting[target][0]]
            start += len(rows)
            try:
                if is_scale:
                    self._quantized.add_scales(target, rows)
                elif is_quantized:
                    self._quantized.add_weight(target, rows)
                else:
                    self._fill_floats(target, rows)
            except CheckpointError as error:
                raise CheckpointError(f"{file}: {name}: {error.message}") from None

    def _fill_floats(self, target: str, rows: torch.Tensor) -> None:
        form = self._form(target)
        if form.name in ("int8", "int4"):
            self._quantized.quantize(target, rows, form)
            return
        value = torch.empty(rows.shape, dtype=self._dtype, device=self._device)
        value.copy_(rows)
        parent_name, _, leaf = target.rpartition(".")
        setattr(self._module.get_submodule(parent_name), leaf, PROCESS_TENSORS.hold(value))

    def _form(self, target: str) -> StoredForm:
        dtype: FloatName = FLOAT_NAMES[self._dtype]
        return form_of(target, self._waiting[target], dtype, self._quantization)

    def _check_shape(
        self, name: str, file: Path, source: torch.Tensor, targets: tuple[str, ...], *, only_rows: bool
    ) -> None:
        """`only_rows`: the other sizes follow from the form, which is not known yet."""
        shapes = [self._waiting[target] for target in targets]
        expected = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        is_right = source.dim() > 0 and len(source) == expected[0] if only_rows else tuple(source.shape) == expected
        if not is_right:
            raise CheckpointError(
                f"{file}: {name} has the shape {_shape(source.shape)}, but config.json asks for {_shape(expected)}; "
                "config and weights are of different models, download them again"
            )

    def _check_complete(self, held: set[str]) -> None:
        missing = sorted(set(self._waiting) - held - ({OUTPUT_WEIGHT} if self._is_tied else set()))
        if missing:
            others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"{self._checkpoint.path}: the weights lack {missing[0]}{others}; download the weight files again"
            )

    def _check_quantized(self) -> None:
        incomplete = self._quantized.find_incomplete()
        if incomplete is not None:
            raise CheckpointError(
                f"{self._checkpoint.path}: the weights lack {incomplete} of a quantized weight (or it is not "
                "quantized); download the weight files again"
            )
        linears = {type(child) for child in self._module.get_decoder().modules() if isinstance(child, LINEAR_CLASSES)}
        if len(linears) > 1:
            raise CheckpointError(
                f"{self._checkpoint.path}: some of its weights are quantized and others are not, or not in the same "
                f"way, which does not run here; {REMEDY}"
            )
        declared = stored_quantization(self._checkpoint.config)
        if declared is not None and self._quantized.held_as is None:
            raise CheckpointError(
                f"{self._checkpoint.path / 'config.json'}: says {declared.source}, but no weight in the files is "
                f"quantized; take that out, and give --quantize {declared.quantization.name} to quantize on load"
            )

    def _tie(self) -> None:
        """Share input and output embedding, but where a checkpoint holds two different ones (as transformers does).

        A quantized output is a copy of its own.
        """
        embedding = self._module.get_input_embeddings().weight
        output = self._module.get_output_embeddings()
        if not isinstance(output, nn.Linear):
            return
        form = self._form(OUTPUT_WEIGHT)
        if form.name in ("int8", "int4"):
            self._quantized.quantize(OUTPUT_WEIGHT, embedding, form)
            return
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


def _is_scale(name: str) -> bool:
    return name.endswith(f".weight{SCALE_SUFFIX}")


def _shape(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(str(size) for size in shape) or "of a single number"


def _unexpected_message(name: str, file: Path, family: str) -> str:
    if "prefix_encoder" in name:
        return f"{file}: {name} belongs to a P-tuning prefix encoder, which does not run here; use the base checkpoint"
    if name.endswith((".weight_scale", ".scales", ".qweight", ".qzeros", ".absmax", ".weight_scale_inv", ".SCB")):
        return f"{file}: {name} belongs to weights that are quantized in a way that is not read here; {REMEDY}"
    return f"{file}: unexpected tensor {name}, which a {family} model of this config.json does not have; download again"


def _config_error(checkpoint: Checkpoint, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())
    return CheckpointError(f"{checkpoint.path / 'config.json'}: transformers refuses it ({reason}); correct the file")
