"""The sampling that a checkpoint recommends. Torch-free; a worker applies it to requests that leave values out."""

from __future__ import annotations

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import SamplingDefaults

RANGES: dict[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 10.0),
}


def load_sampling_defaults(checkpoint: Checkpoint) -> SamplingDefaults:
    """The values that generation_config.json gives; FastChat's (temperature 0.7, top_p 1) for those it does not.

    `do_sample` is not read, as in vLLM: an API request that wants greedy decoding says temperature 0, and many chat
    models ship a temperature without that key.
    """
    values = {name: _number(checkpoint, name, *limits) for name, limits in RANGES.items()}
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("top_p") == 0.0:
        del given["top_p"]
    top_k = _number(checkpoint, "top_k", -1, 2**31)
    return SamplingDefaults(**given, top_k=max(0, int(top_k or 0)))


def _number(checkpoint: Checkpoint, name: str, low: float, high: float) -> float | None:
    value = checkpoint.generation_config.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise CheckpointError(
            f"{checkpoint.path / 'generation_config.json'}: {name} is {value!r}, not between {low} and {high}; "
            "correct or remove it"
        )
    return float(value)
