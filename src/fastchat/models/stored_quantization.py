"""What a config.json says of weights that are quantized on disk. Torch-free.

Two kinds are read: ChatGLM2's official int8 and int4 (`quantization_bit`), and what `fastchat convert` writes
(`quantization_config` with the method `fastchat`). All others are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastchat.errors import ConfigError, UnsupportedModelError
from fastchat.models.stored_form import GROUP_SIZES, Quantization, QuantizedName

Config = Mapping[str, Any]  # Any: config.json as it is on disk

OWN_METHOD = "fastchat"
REMEDY = (
    "give --model-path the original float16 or bfloat16 checkpoint, and --quantize int8 or int4 to make it as small"
)
NAMES_BY_BITS: Mapping[int, QuantizedName] = {8: "int8", 4: "int4"}


@dataclass(frozen=True, slots=True)
class StoredQuantization:
    """How the weights on disk are quantized. `covers_all`: what is not quantized yet becomes so on load."""

    quantization: Quantization
    source: str
    covers_all: bool


def stored_quantization(config: Config) -> StoredQuantization | None:
    """What a config.json declares, None for plain weights. Raises `UnsupportedModelError` for what is not read."""
    options = config.get("quantization_config")
    if options:
        return _read_options(options)
    bits = config.get("quantization_bit")
    if not bits:
        return None
    name = _name(bits)
    if name is None:
        raise UnsupportedModelError(f"config.json: quantization_bit is {bits!r}, but only 4 and 8 are read; {REMEDY}")
    # One scale per row, held as equal scales of groups: the largest group has the fewest.
    return StoredQuantization(Quantization(name, max(GROUP_SIZES)), f"quantization_bit {bits}", covers_all=False)


def choose_quantization(config: Config, asked: Quantization | None) -> Quantization | None:
    """What is to be quantized on load. Raises `ConfigError` where weights are quantized already, and otherwise."""
    stored = stored_quantization(config)
    if stored is None:
        return asked
    if asked is not None and asked.name != stored.quantization.name:
        raise ConfigError(
            f"--quantize {asked.name}: the checkpoint is {stored.quantization.name} already (config.json: "
            f"{stored.source}); leave the flag out, or give the original checkpoint."
        )
    return stored.quantization if stored.covers_all else asked


def values_per_number(dtype: str, config: Config) -> int:
    """How many weights one stored number of that type stands for: two where int4 is packed."""
    stored = stored_quantization(config)
    is_official_int4 = stored is not None and stored.quantization.name == "int4" and not stored.covers_all
    return 2 if dtype == "uint8" or (dtype == "int8" and is_official_int4) else 1


def own_marker(quantization: Quantization) -> dict[str, str | int]:
    """The `quantization_config` of a checkpoint that is written here."""
    bits = next(bits for bits, name in NAMES_BY_BITS.items() if name == quantization.name)
    marker: dict[str, str | int] = {"quant_method": OWN_METHOD, "bits": bits}
    return marker | ({"group_size": quantization.group_size} if quantization.name == "int4" else {})


def _read_options(options: object) -> StoredQuantization:
    method = options.get("quant_method", "unknown") if isinstance(options, Mapping) else options
    if not isinstance(options, Mapping) or method != OWN_METHOD:
        raise UnsupportedModelError(
            f"config.json: the checkpoint is quantized (quantization_config: {method}), which is not read here; "
            f"{REMEDY}"
        )
    name, group_size = _name(options.get("bits")), options.get("group_size", max(GROUP_SIZES))
    if name is None or group_size not in GROUP_SIZES:
        raise UnsupportedModelError(
            f"config.json: the quantization_config {dict(options)} is not one that `fastchat convert` writes; "
            "convert the checkpoint again"
        )
    return StoredQuantization(Quantization(name, group_size), f"quantization_config, {name}", covers_all=True)


def _name(bits: object) -> QuantizedName | None:
    return NAMES_BY_BITS.get(bits) if isinstance(bits, int) else None
