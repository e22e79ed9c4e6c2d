"""The sampling that a checkpoint recommends, and FastChat's where it is silent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.interface import SamplingDefaults
from fastchat.models.sampling_defaults import load_sampling_defaults
from tests.checkpoints import write_checkpoint


@pytest.mark.parametrize(
    ("generation_config", "expected"),
    [
        (None, SamplingDefaults()),
        ({"eos_token_id": 2}, SamplingDefaults(temperature=0.7, top_p=1.0)),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, SamplingDefaults(temperature=0.6, top_p=0.9)),
        (
            {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05},
            SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20, min_p=0.05, repetition_penalty=1.05),
        ),
        ({"top_k": -1, "temperature": None}, SamplingDefaults()),
        ({"do_sample": False, "temperature": 0}, SamplingDefaults(temperature=0.0)),
    ],
)
def test_given_values_win_and_missing_ones_are_fastchats(
    tmp_path: Path, generation_config: dict[str, Any] | None, expected: SamplingDefaults
) -> None:
    write_checkpoint(tmp_path, "llama", generation_config=generation_config)
    assert load_sampling_defaults(Checkpoint.open(tmp_path)) == expected


@pytest.mark.parametrize("values", [{"temperature": "hot"}, {"top_p": 1.5}, {"repetition_penalty": 0}])
def test_a_value_that_cannot_be_obeyed_names_the_file_and_the_key(tmp_path: Path, values: dict[str, Any]) -> None:
    write_checkpoint(tmp_path, "llama", generation_config=values)
    with pytest.raises(CheckpointError, match=rf"generation_config.json: {next(iter(values))} is"):
        load_sampling_defaults(Checkpoint.open(tmp_path))
