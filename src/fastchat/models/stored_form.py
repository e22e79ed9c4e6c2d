"""In which form a weight is held in memory, and the bytes that it takes so. Torch-free.

The quantized forms are those of `native/products.py`. Embeddings, norms and biases keep the number type of the model;
the weight of every Linear is quantized, the output head's to int8 at the least. A head that is tied to the input
embedding becomes an int8 copy of its own: the embedding stays, since a product reads all of it and a lookup one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fastchat.errors import ConfigError

FloatName = Literal["float32", "bfloat16", "float16"]
QuantizedName = Literal["int8", "int4"]
FormName = Literal["float32", "bfloat16", "float16", "int8", "int4"]

FLOAT_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_BYTES = 4
GROUP_SIZES = (32, 64, 128)
DEFAULT_GROUP_SIZE = 64
UNIT = 64
"""Inputs that int4 packs together (`native/products.py`); the last unit of a row is filled up."""

OUTPUT_WEIGHT = "lm_head.weight"
INPUT_WEIGHT = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class StoredForm:
    """The form of one weight; `group_size` is the number of inputs that share a scale, for int4 alone."""

    name: FormName
    group_size: int = DEFAULT_GROUP_SIZE


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the Linears of a model are quantized while they are loaded. Raises `ConfigError` for an unknown size."""

    name: QuantizedName
    group_size: int = DEFAULT_GROUP_SIZE

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ConfigError(
                f"a group of {self.group_size} inputs is not one of {', '.join(map(str, GROUP_SIZES))} for int4."
            )


def form_of(name: str, shape: Sequence[int], dtype: FloatName, quantization: Quantization | None) -> StoredForm:
    """The form that a parameter (by its name in transformers' class) is held in, loaded so."""
    if quantization is None or not is_linear_weight(name, shape):
        return StoredForm(dtype)
    if name == OUTPUT_WEIGHT:
        return StoredForm("int8")
    return StoredForm(quantization.name, quantization.group_size)


def is_linear_weight(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter is the weight of a Linear: in every family all matrices but the input embedding are."""
    return len(shape) == 2 and name.endswith(".weight") and name != INPUT_WEIGHT


def held_bytes(shape: Sequence[int], form: StoredForm) -> int:
    """The bytes of a parameter of that shape, (N, K) for a matrix, its scales included."""
    num_values = 1
    for size in shape:
        num_values *= size
    if form.name in FLOAT_BYTES:
        return num_values * FLOAT_BYTES[form.name]
    num_rows, num_inputs = shape
    if form.name == "int8":
        return num_values + num_rows * SCALE_BYTES
    num_padded = padded_inputs(num_inputs)
    num_groups = num_padded // fitting_group(num_inputs, form.group_size)
    return num_rows * (num_padded // 2 + num_groups * SCALE_BYTES)


def padded_inputs(num_inputs: int) -> int:
    """K rounded up to whole units."""
    return -(-num_inputs // UNIT) * UNIT


def fitting_group(num_inputs: int, group_size: int) -> int:
    """The group size itself, or the largest below it that divides the padded row."""
    padded = padded_inputs(num_inputs)
    return max(size for size in GROUP_SIZES if size <= group_size and padded % size == 0)
