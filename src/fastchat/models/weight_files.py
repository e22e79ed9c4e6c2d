"""The files that hold a checkpoint's weights, checked before a byte of them is used. Torch-free.

    model.safetensors               a single file                             preferred, as in transformers
    model.safetensors.index.json    shards named by the index, any number
    pytorch_model.bin               a single file
    pytorch_model.bin.index.json    shards named by the index, any number

A safetensors file is an 8-byte length, a JSON header with every tensor's place, and the data, so a file that was cut
short is known by its size. A `.bin` file is a zip archive, whose directory is at its end.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import read_json_file, told_if_unreadable

WeightFormat = Literal["safetensors", "bin"]

LAYOUTS: tuple[tuple[str, WeightFormat], ...] = (
    ("model.safetensors", "safetensors"),
    ("model.safetensors.index.json", "safetensors"),
    ("pytorch_model.bin", "bin"),
    ("pytorch_model.bin.index.json", "bin"),
)
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors specification."""

LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of weights. `tensor_names` is None for a single `.bin`, whose names are known once it is open."""

    path: Path
    tensor_names: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class WeightFiles:
    """All files of a checkpoint's weights, in the order of their names."""

    format: WeightFormat
    shards: tuple[Shard, ...]

    @property
    def tensor_names(self) -> frozenset[str] | None:
        """Every tensor, or None where a file has to be opened to know."""
        names: set[str] = set()
        for shard in self.shards:
            if shard.tensor_names is None:
                return None
            names.update(shard.tensor_names)
        return frozenset(names)


def find_weight_files(folder: Path, layouts: Sequence[tuple[str, WeightFormat]] = LAYOUTS) -> WeightFiles:
    """The weights of a folder, each file whole. Raises `CheckpointError` naming the file and the remedy."""
    for name, weight_format in layouts:
        with told_if_unreadable(folder / name):
            if (folder / name).is_file():
                is_index = name.endswith(".index.json")
                shards = _indexed_shards(folder / name) if is_index else (Shard(folder / name, None),)
                check = _check_safetensors if weight_format == "safetensors" else _check_bin
                return WeightFiles(weight_format, tuple(check(shard) for shard in shards))
    raise CheckpointError(
        f"{folder}: no weights (none of {', '.join(name for name, _ in layouts)}); download the model's weight files"
    )


def _indexed_shards(index_file: Path) -> tuple[Shard, ...]:
    index = read_json_file(index_file) or {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index_file}: has no weight_map; download it again")
    names_by_file: dict[str, list[str]] = {}
    for tensor_name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(f"{index_file}: {file_name!r} is not the name of a file in the same folder")
        names_by_file.setdefault(file_name, []).append(tensor_name)
    missing = sorted(name for name in names_by_file if not (index_file.parent / name).is_file())
    if missing:
        others = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{index_file.parent / missing[0]}: missing{others}, though {index_file.name} lists it; "
            f"download the {len(names_by_file)} weight files again"
        )
    return tuple(Shard(index_file.parent / name, tuple(names_by_file[name])) for name in sorted(names_by_file))


def _check_safetensors(shard: Shard) -> Shard:
    header, num_bytes_needed = _read_header(shard.path)
    num_bytes = shard.path.stat().st_size
    if num_bytes != num_bytes_needed:
        raise _truncated(shard.path, f"{num_bytes} bytes, {num_bytes_needed} expected")
    names = tuple(name for name in header if name != "__metadata__")
    _check_listed(shard, names)
    return Shard(shard.path, shard.tensor_names or names)


def _read_header(file: Path) -> tuple[Mapping[str, Any], int]:  # Any: JSON as it is on disk
    """The header of a safetensors file and the number of bytes that the whole file must have."""
    with file.open("rb") as stream:
        _refuse_pointer(file, stream.read(len(LFS_POINTER)))
        stream.seek(0)
        num_header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= num_header_bytes <= MAX_HEADER_BYTES:
            raise _truncated(file, "its header is not that of a safetensors file")
        try:
            header = json.loads(stream.read(num_header_bytes))
            entries = [entry for name, entry in header.items() if name != "__metadata__"]
            num_data_bytes = max((int(entry["data_offsets"][1]) for entry in entries), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
            raise _truncated(file, "its header cannot be read") from None
    return header, 8 + num_header_bytes + num_data_bytes


def _check_bin(shard: Shard) -> Shard:
    with shard.path.open("rb") as stream:
        start = stream.read(len(LFS_POINTER))
    _refuse_pointer(shard.path, start)
    if not start.startswith(b"PK"):
        raise CheckpointError(
            f"{shard.path}: not a weight file of PyTorch 1.6 or later (a zip archive), or damaged; download it again, "
            "or convert it to safetensors"
        )
    try:
        with zipfile.ZipFile(shard.path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error):
        raise _truncated(shard.path, f"{shard.path.stat().st_size} bytes without the end of a zip archive") from None
    for member in members:
        # torch never compresses, so what unpacks to more than the file was made to fill the memory.
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > shard.path.stat().st_size:
            raise _truncated(shard.path, f"{member.filename[:100]!r} in it is compressed, which torch never does")
        if member.filename.endswith("data.pkl") and member.file_size > MAX_HEADER_BYTES:
            raise _truncated(shard.path, f"its list of tensors has {member.file_size} bytes")
    return shard


def _check_listed(shard: Shard, names: tuple[str, ...]) -> None:
    absent = sorted(set(shard.tensor_names or ()) - set(names))
    if absent:
        raise missing_tensor_error(shard.path, absent[0])


def missing_tensor_error(file: Path, tensor_name: str) -> CheckpointError:
    """The index lists a tensor in a file that does not hold it."""
    return CheckpointError(
        f"{file}: lacks the tensor {tensor_name}, which the index lists in it; index and weights are of "
        "different downloads, download them again"
    )


def tensor_twice_error(file: Path, tensor_name: str) -> CheckpointError:
    """Which of the two is meant, nobody can know."""
    return CheckpointError(
        f"{file}: {tensor_name} is in another weight file as well; the files are of different downloads, download them "
        "again"
    )


def _refuse_pointer(file: Path, start: bytes) -> None:
    if start == LFS_POINTER:
        raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder")


def _truncated(file: Path, fact: str) -> CheckpointError:
    return CheckpointError(f"{file}: truncated or damaged ({fact}); download this file again")
