"""Writes safetensors files tensor by tensor: the header is known from shapes before the first value is.

A file is an 8-byte length, a JSON header with the type, shape and place of each tensor, and their bytes in that order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

TYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """One open file; tensors come in the order of its header."""

    def __init__(self, stream: BinaryIO, specs: Sequence[TensorSpec]) -> None:
        self._stream = stream
        self._waiting = list(reversed(specs))
        header = _header(specs)
        stream.write(len(header).to_bytes(8, "little") + header)

    def write(self, tensor: Tensor) -> None:
        """The next tensor, from whichever device."""
        spec = self._waiting.pop()
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        values.numpy().tofile(self._stream)

    @property
    def is_complete(self) -> bool:
        """Whether all tensors of the header are there."""
        return not self._waiting


@contextmanager
def write_safetensors(file: Path, specs: Sequence[TensorSpec]) -> Iterator[SafetensorsWriter]:
    """A new file for these tensors, all of which are written when the block ends."""
    with file.open("xb") as stream:
        writer = SafetensorsWriter(stream, specs)
        yield writer
        assert writer.is_complete


def _header(specs: Sequence[TensorSpec]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        entries[spec.name] = {"dtype": TYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % ALIGNMENT)
