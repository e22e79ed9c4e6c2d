"""Names, types and shapes of the tensors in a file of weights, from its header alone. Torch-free; runs nothing.

A safetensors file has a JSON header. A `.bin` file is a zip archive whose `data.pkl` is a program of pickle: its
operations are listed (`pickletools.genops`), never executed. torch writes each tensor as

    name, _rebuild_tensor_v2, ("storage", torch.HalfStorage, key, location, number of values), BINPERSID, offset,
    sizes of the shape, the end of a tuple, ...

so the five values in front of BINPERSID and those up to the next tuple say all that is asked here.
"""

from __future__ import annotations

import json
import math
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastchat.errors import CheckpointError

_SAFETENSORS_TYPES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_STORAGE_TYPES: Mapping[str, str] = {
    "torch DoubleStorage": "float64",
    "torch FloatStorage": "float32",
    "torch HalfStorage": "float16",
    "torch BFloat16Storage": "bfloat16",
    "torch LongStorage": "int64",
    "torch IntStorage": "int32",
    "torch ShortStorage": "int16",
    "torch CharStorage": "int8",
    "torch ByteStorage": "uint8",
    "torch BoolStorage": "bool",
}
_MAX_PROGRAM_BYTES = 64 * 2**20
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"})
_MAX_SIZE = 2**40
"""Of one dimension; more is no size."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as it lies in a file."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not all(type(size) is int and 0 <= size <= _MAX_SIZE for size in self.shape):
            raise ValueError(f"the shape of {self.name[:100]}")

    @property
    def num_values(self) -> int:
        """The numbers in it."""
        return math.prod(self.shape)


def read_stored_tensors(file_format: Literal["safetensors", "bin"], file: Path) -> list[StoredTensor]:
    """The tensors of a file that `find_weight_files` has checked. Raises `CheckpointError`."""
    try:
        return list(_read_safetensors(file) if file_format == "safetensors" else _read_bin(file))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file}: its header cannot be read ({error}); download this file again") from None


def _read_safetensors(file: Path) -> Iterator[StoredTensor]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    for name, entry in header.items():
        if name != "__metadata__":
            kind = str(entry["dtype"])
            yield StoredTensor(name, _SAFETENSORS_TYPES.get(kind, kind), tuple(entry["shape"]))


def _read_bin(file: Path) -> Iterator[StoredTensor]:
    with zipfile.ZipFile(file) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if archive.getinfo(member).file_size > _MAX_PROGRAM_BYTES:
            raise ValueError("its list of tensors is too long")
        program = archive.read(member)
    seen: set[tuple[str, int]] = set()
    for values, offset, shape in _storages(program):
        _, kind, key, _, _ = values[-5:]
        name = next(value for value in reversed(values[:-5]) if isinstance(value, str) and " " not in value)
        if (key, offset) not in seen:  # tied tensors are one place of one storage, which may hold others too
            seen.add((key, offset))
            yield StoredTensor(name, _STORAGE_TYPES.get(kind, str(kind)), shape)


def _storages(program: bytes) -> Iterator[tuple[list[Any], int, tuple[int, ...]]]:  # Any: constants of the program
    """For each BINPERSID the constants pushed before it, since the one before, and the offset and shape that follow.

    Classes are as `module name`.
    """
    memo: dict[int, Any] = {}
    pushed: list[Any] = []
    storage: list[Any] | None = None  # of a tensor whose shape is yet to come
    top: Any = None  # what a PUT would keep: a constant, or None for anything that is built
    for operation, argument, _ in pickletools.genops(program):
        name = operation.name
        if name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument or 0)] = top
        elif name in ("BINGET", "LONG_BINGET"):
            top = memo[int(argument or 0)]
            pushed.append(top)
        elif name == "STACK_GLOBAL":
            top = " ".join(pushed[-2:])
            pushed[-2:] = [top]
        elif name == "BINPERSID":
            storage, pushed, top = pushed, [], None
        elif name in _TUPLES and storage is not None:
            yield storage, int(pushed[0]), tuple(pushed[1:])
            storage, pushed, top = None, [], None
        elif argument is not None:
            top = argument
            pushed.append(top)
        else:
            top = None
