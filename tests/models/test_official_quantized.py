"""ChatGLM2's official int8 and int4 checkpoints, written here by a formula of their own, mean what they say.

A weight is code * scale of its row; the scale is the row's largest value / 127 or / 7. Int4 codes are signed numbers of
four bits, two in a byte: the first in the high half.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastchat.errors import CheckpointError, ConfigError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.quantize import dequantize_int4, dequantize_int8
from fastchat.models.quantized_linear import Int4Linear, Int8Linear
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from tests.checkpoints import write_checkpoint, write_weights
from tests.reference import FOLDER, needs_reference

QUANTIZED = ("query_key_value.weight", "dense.weight", "dense_h_to_4h.weight", "dense_4h_to_h.weight")
SIZES = {"hidden_size": 96, "ffn_hidden_size": 200, "num_attention_heads": 6}
"""Inputs that do not fill whole units and groups."""


def quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """What is stored of a weight, and the float32 values that it stands for."""
    values = weight.float().numpy()
    scales = (np.abs(values).max(axis=1) / (2 ** (bits - 1) - 1)).astype(np.float16)
    codes = np.rint(values / scales[:, None].astype(np.float32)).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    means = torch.from_numpy((codes * scales[:, None].astype(np.float32)).astype(np.float32))
    stored = codes.astype(np.int64) & 0xFF
    if bits == 4:
        stored = ((codes[:, 0::2].astype(np.int64) & 15) << 4) | (codes[:, 1::2].astype(np.int64) & 15)
    return torch.from_numpy(stored.astype(np.uint8).view(np.int8)), torch.from_numpy(scales), means


def quantize_checkpoint(tensors: dict[str, Tensor], bits: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The official layout of plain tensors, and the same model in floats."""
    stored, plain = {}, {}
    for name, value in tensors.items():
        stored[name] = plain[name] = value
        if name.endswith(QUANTIZED):
            stored[name], stored[f"{name}_scale"], plain[name] = quantized(value, bits)
    return stored, plain


def write_both(folder: Path, bits: int, layout: Any, num_shards: int = 1) -> tuple[Path, Path]:
    source = write_checkpoint(folder / "source", "chatglm2", dtype=torch.float16, num_shards=1, config=SIZES)
    from safetensors.torch import load_file

    stored, plain = quantize_checkpoint(load_file(source / "model.safetensors"), bits)
    for name, tensors in (("official", stored), ("plain", plain)):
        write_checkpoint(folder / name, "chatglm2", dtype=torch.float16, num_shards=1, config=SIZES)
        (folder / name / "model.safetensors").unlink()
        write_weights(folder / name, tensors, num_shards, layout)
    config = json.loads((folder / "official/config.json").read_text())
    (folder / "official/config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    return folder / "official", folder / "plain"


def values_of(linear: Int8Linear | Int4Linear) -> Tensor:
    if isinstance(linear, Int8Linear):
        return dequantize_int8(linear.weight, linear.scales)
    return dequantize_int4(linear.packed, linear.scales)[:, : linear.in_features]


def assert_same_weights(official: Path, plain: Path, bits: int) -> None:
    ours = load_model(Checkpoint.open(official), dtype="float32")
    floats = load_model(Checkpoint.open(plain), dtype="float32")
    count = 0
    for name, child in floats.named_modules():
        if isinstance(child, torch.nn.Linear) and name != "lm_head":
            held = ours.get_submodule(name)
            assert isinstance(held, Int8Linear if bits == 8 else Int4Linear)
            assert torch.equal(values_of(held), child.weight), name
            assert (held.bias is None) == (child.bias is None)
            assert held.bias is None or torch.equal(held.bias, child.bias)
            count += 1
    assert count == 6 * floats.config.num_hidden_layers
    assert torch.equal(ours.lm_head.weight, floats.lm_head.weight)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        exact, found = floats(input_ids=ids).logits, ours(input_ids=ids).logits
    assert (found - exact).norm() / exact.norm() < 0.06  # the products round their inputs


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("layout", "num_shards"), [("bin", 1), ("bin", 4), ("safetensors", 7)])
def test_every_weight_is_the_number_that_the_files_say(tmp_path: Path, bits: int, layout: Any, num_shards: int) -> None:
    """To the last bit, though a weight and its scales may lie in different files."""
    assert_same_weights(*write_both(tmp_path, bits, layout, num_shards), bits)


@needs_reference
@pytest.mark.parametrize("bits", [8, 4])
def test_the_reference_checkpoint_in_the_official_layout(tmp_path: Path, bits: int) -> None:
    source = FOLDER / "chatglm2-tiny"
    tensors: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.bin")):
        tensors |= torch.load(file, weights_only=True)
    config = json.loads((source / "config.json").read_text())
    for name, content, marks in zip(
        ("official", "plain"), quantize_checkpoint(tensors, bits), ({"quantization_bit": bits}, {}), strict=True
    ):
        (tmp_path / name).mkdir()
        write_weights(tmp_path / name, content, 2, "bin")
        (tmp_path / name / "config.json").write_text(json.dumps({**config, **marks}))
    assert_same_weights(tmp_path / "official", tmp_path / "plain", bits)


def test_it_is_known_by_its_content_alone(tmp_path: Path) -> None:
    """A config.json without `quantization_bit` beside quantized weights."""
    official, plain = write_both(tmp_path, 4, "bin")
    edit_config(official, quantization_bit=0)
    assert_same_weights(official, plain, 4)


def test_what_is_not_quantized_yet_becomes_so_when_asked(tmp_path: Path) -> None:
    official, _ = write_both(tmp_path, 4, "bin")
    model = load_model(Checkpoint.open(official), quantization=Quantization("int4"))
    assert isinstance(model.lm_head, Int8Linear)
    with pytest.raises(ConfigError, match=r"int4 already \(config.json: quantization_bit 4\)"):
        load_model(Checkpoint.open(official), quantization=Quantization("int8"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def drop_scale(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("dense.weight_scale"))]


def drop_weight(tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if name.endswith("dense.weight"))]


def shorten_scale(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("dense.weight_scale"))
    tensors[name] = tensors[name][:-1].clone()


def shorten_weight(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("dense.weight"))
    tensors[name] = tensors[name][:, :-1].clone()


def spoil_scale(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("dense.weight_scale"))
    tensors[name][0] = torch.nan


def make_scale_whole(tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if name.endswith("dense.weight_scale"))
    tensors[name] = tensors[name].to(torch.int32)


def give_norm_a_scale(tensors: dict[str, Tensor]) -> None:
    tensors["transformer.encoder.final_layernorm.weight_scale"] = torch.ones(96)


def unquantize(tensors: dict[str, Tensor]) -> None:
    """One weight in floats among quantized ones."""
    name = next(name for name in tensors if name.endswith("dense.weight"))
    tensors[name] = torch.zeros(96, 96)
    del tensors[f"{name}_scale"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_scale, "lack model.layers.0.self_attn.o_proj.weight_scale"),
        (drop_weight, "lack model.layers.0.self_attn.o_proj.weight"),
        (shorten_scale, "dense.weight_scale has the shape"),
        (shorten_weight, "dense.weight: a quantized weight of type int8"),
        (spoil_scale, "not finite numbers"),
        (make_scale_whole, "is of type int32"),
        (give_norm_a_scale, "final_layernorm.weight_scale"),
        (unquantize, "some of its weights are quantized and others are not"),
    ],
)
def test_damaged_quantized_weights_are_one_line(
    tmp_path: Path, damage: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    official, _ = write_both(tmp_path, 8, "bin")
    tensors = torch.load(official / "pytorch_model.bin", weights_only=True)
    damage(tensors)
    torch.save(tensors, official / "pytorch_model.bin")
    with pytest.raises(CheckpointError) as error:
        load_model(Checkpoint.open(official))
    assert words in error.value.message
    assert "\n" not in error.value.message


def test_a_config_that_promises_quantized_weights_which_are_not_there_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "chatglm2")
    edit_config(tmp_path, quantization_bit=4)
    with pytest.raises(CheckpointError, match=r"says quantization_bit 4, .* give --quantize int4"):
        load_model(Checkpoint.open(tmp_path))
