"""A converted checkpoint is whole, loads directly, and computes the same bits as quantizing on load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastchat.errors import CheckpointError, ConfigError
from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.conversion import convert_checkpoint
from fastchat.models.inspection import inspect_checkpoint
from fastchat.models.stored_form import Quantization
from fastchat.models.tokenizer import load_tokenizer
from fastchat.models.weights import load_model
from fastchat.serve.arguments import exit_code_of
from fastchat.serve.convert_command import main
from tests.checkpoints import FAMILIES, FamilyName, write_checkpoint
from tests.models.test_official_quantized import write_both
from tests.models.test_quantized_loading import FORMS, logits_of
from tests.reference import FOLDER, needs_reference


def logits_after(folder: Path, quantization: Quantization | None = None, dtype: Any = "float32") -> torch.Tensor:
    return logits_of(load_model(Checkpoint.open(folder), dtype=dtype, quantization=quantization))


@pytest.mark.parametrize("quantization", [None, *FORMS], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_converted_and_quantized_on_load_are_the_same_bits(
    tmp_path: Path, family: FamilyName, quantization: Quantization | None
) -> None:
    """Tied heads too; with and without the flag that the files already obey."""
    source = write_checkpoint(tmp_path / "source", family, dtype=torch.float16, layout="bin", num_shards=3)
    convert_checkpoint(Checkpoint.open(source), tmp_path / "new", quantization=quantization, max_shard_bytes=60_000)
    expected = logits_after(source, quantization)
    assert torch.equal(logits_after(tmp_path / "new"), expected)
    assert torch.equal(logits_after(tmp_path / "new", quantization), expected)
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 1
    assert inspect_checkpoint(Checkpoint.open(tmp_path / "new")).footprint.layout == "safetensors"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, Quantization("int4", 32)], ids=str)
def test_what_is_not_quantized_has_the_asked_type(
    tmp_path: Path, dtype: Any, quantization: Quantization | None
) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen2")
    convert_checkpoint(Checkpoint.open(source), tmp_path / "new", quantization=quantization, dtype=dtype)
    tensors = load_file(tmp_path / "new/model.safetensors")
    floats = {name: value.dtype for name, value in tensors.items() if "_proj.weight" not in name}
    assert set(floats.values()) == {getattr(torch, dtype)}
    assert torch.equal(logits_after(tmp_path / "new", None, dtype), logits_after(source, quantization, dtype))
    assert json.loads((tmp_path / "new/config.json").read_text())["torch_dtype"] == dtype


@pytest.mark.parametrize("bits", [8, 4])
def test_an_official_quantized_checkpoint_keeps_its_numbers(tmp_path: Path, bits: int) -> None:
    official, _ = write_both(tmp_path, bits, "bin")
    convert_checkpoint(Checkpoint.open(official), tmp_path / "new")
    assert torch.equal(logits_after(tmp_path / "new"), logits_after(official))
    asked = Quantization("int8" if bits == 8 else "int4")
    convert_checkpoint(Checkpoint.open(official), tmp_path / "all", quantization=asked)
    assert torch.equal(logits_after(tmp_path / "all"), logits_after(official, asked))


def test_converting_again_changes_nothing(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "qwen2")
    convert_checkpoint(Checkpoint.open(source), tmp_path / "once", quantization=Quantization("int4"))
    convert_checkpoint(Checkpoint.open(tmp_path / "once"), tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(torch.equal(value, twice[name]) for name, value in once.items())
    with pytest.raises(ConfigError, match="is int4 already"):
        convert_checkpoint(Checkpoint.open(tmp_path / "once"), tmp_path / "thrice", quantization=Quantization("int8"))


@pytest.mark.parametrize("name", ["chatglm2-6b", "my-model"])
def test_prompts_stay_the_same_in_a_folder_of_another_name(tmp_path: Path, name: str) -> None:
    """A format that was known by the folder's name alone is known by the new config.json."""
    source = write_checkpoint(tmp_path / name, "chatglm2", config={"_name_or_path": ""})
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "name_or_path": ""}))
    (source / ".cache").write_text("hidden")
    (source / "LICENSE").write_text("free")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    convert_checkpoint(Checkpoint.open(source), tmp_path / "small")
    formats = []
    for folder in (source, tmp_path / "small"):
        checkpoint = Checkpoint.open(folder)
        formats.append(load_chat_format(checkpoint, load_tokenizer(checkpoint)).name)
    assert formats[0] == formats[1] == ("chatglm2" if name == "chatglm2-6b" else "none")
    assert (tmp_path / "small/LICENSE").read_text() == "free"
    assert (tmp_path / "small/additional_chat_templates/tool_use.jinja").read_text() == "{{ tools }}"
    assert not (tmp_path / "small/.cache").exists()


@needs_reference
def test_the_reference_checkpoint_is_converted_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--quantize", "int4", "--quantize-group-size", "32", "--max-shard-size", "2MB"]
    assert main([str(FOLDER / "chatglm2-tiny"), str(tmp_path / "new"), *flags]) == 0
    assert f"--model-path {tmp_path / 'new'}" in capsys.readouterr().out
    expected = logits_after(FOLDER / "chatglm2-tiny", Quantization("int4", 32))
    assert torch.equal(logits_after(tmp_path / "new"), expected)
    inspection = inspect_checkpoint(Checkpoint.open(tmp_path / "new"))
    original = inspect_checkpoint(Checkpoint.open(FOLDER / "chatglm2-tiny"))
    assert inspection.prompt_format == original.prompt_format
    # Rows are filled up to whole units, which the headers cannot tell from weights.
    assert inspection.footprint.num_parameters == pytest.approx(original.footprint.num_parameters, rel=1e-3)


def break_file(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][5, 5] = torch.nan
    from safetensors.torch import save_file

    save_file(tensors, folder / "model.safetensors")


def lose_tensor(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def double_tensor(folder: Path) -> None:
    """In a second file, which the index does not say: shards of two downloads."""
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    head = {"lm_head.weight": tensors.pop("lm_head.weight")}
    save_file(tensors, folder / "model-1.safetensors")
    save_file({**head, "model.norm.weight": tensors["model.norm.weight"]}, folder / "model-2.safetensors")
    weight_map = dict.fromkeys(tensors, "model-1.safetensors") | dict.fromkeys(head, "model-2.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (break_file, "not finite"),
        (lose_tensor, "lack model.norm.weight"),
        (double_tensor, "model.norm.weight is in another weight file"),
    ],
)
def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, damage: Any, words: str) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", num_shards=1)
    damage(source)
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(Checkpoint.open(source), tmp_path / "new", quantization=Quantization("int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_exists_is_never_touched(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for taken in (source, tmp_path / "file"):
        with pytest.raises(ConfigError, match="not an empty folder") as error:
            main([str(source), str(taken)])
        assert exit_code_of(error.value) == 2
    assert main([str(source), str(tmp_path / "empty")]) == 0
    assert main([str(source), str(tmp_path / "deeper" / "new")]) == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_a_destination_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="cannot be written"):
        main([str(source), str(tmp_path / "file" / "new")])


def test_a_refused_source_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", "llama", config={"quantization_config": {"quant_method": "gptq"}})
    command = [sys.executable, "-X", "importtime", "-m", "fastchat", "convert", str(source), str(tmp_path / "new")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert result.returncode == 2
    assert "quantization_config: gptq" in result.stderr.splitlines()[-1]
    assert not any(line.endswith("| torch") for line in result.stderr.splitlines())
