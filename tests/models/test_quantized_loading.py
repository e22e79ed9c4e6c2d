"""Models that are quantized while they are loaded: every family, every form, each row by itself, never whole first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from fastchat.errors import CheckpointError, ConfigError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.quantized_linear import Int4Linear, Int8Linear, QuantizedLinear
from fastchat.models.stored_form import Quantization, form_of, held_bytes
from fastchat.models.weights import build_empty_module, load_model
from tests.checkpoints import FAMILIES, FamilyName, write_checkpoint

FORMS = [Quantization("int8"), *(Quantization("int4", size) for size in (32, 64, 128))]
IDS = torch.arange(3, 40)[None] * 7 % 480


def load(folder: Path, quantization: Quantization | None, dtype: Any = "float32") -> transformers.PreTrainedModel:
    return load_model(Checkpoint.open(folder), dtype=dtype, quantization=quantization)


def logits_of(model: transformers.PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=ids).logits
    return logits.float()


def error_of(logits: torch.Tensor, exact: torch.Tensor) -> float:
    return float((logits - exact).norm() / exact.norm())


@pytest.mark.parametrize("quantization", FORMS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_quantized_and_the_head_to_int8(
    tmp_path: Path, family: FamilyName, quantization: Quantization
) -> None:
    write_checkpoint(tmp_path, family, dtype=torch.float16)
    model = load(tmp_path, quantization, "bfloat16")
    linears = {
        name: type(child) for name, child in model.named_modules() if isinstance(child, nn.Linear | QuantizedLinear)
    }
    expected = Int8Linear if quantization.name == "int8" else Int4Linear
    assert set(linears.values()) - {Int8Linear} <= {expected}
    assert linears.pop("lm_head") is Int8Linear
    assert set(linears.values()) == {expected}
    assert model.held_as == quantization.name
    assert model.dtype == model.config.dtype == model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("quantization", [None, *FORMS], ids=str)
@pytest.mark.parametrize("family", ["chatglm2", "qwen2"])
def test_a_form_takes_the_bytes_that_are_told_beforehand(
    tmp_path: Path, family: FamilyName, quantization: Quantization | None, dtype: Any
) -> None:
    """Computed from shapes alone; a tied head counts where it is a copy."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path, family))
    model = load(tmp_path, quantization, dtype)
    empty = build_empty_module(checkpoint)
    told = sum(
        held_bytes(parameter.shape, form_of(name, parameter.shape, dtype, quantization))
        for name, parameter in empty.named_parameters(remove_duplicate=quantization is None)
    )
    assert sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) == told


@pytest.mark.parametrize("family", FAMILIES)
def test_int8_is_close_to_float32_and_int4_is_not_far(tmp_path: Path, family: FamilyName) -> None:
    """On random weights, which are harder to quantize than trained ones are to use."""
    write_checkpoint(tmp_path, family)
    exact = logits_of(load(tmp_path, None))
    errors = [error_of(logits_of(load(tmp_path, quantization)), exact) for quantization in FORMS]
    assert errors[0] < 0.06
    assert errors[1] < 0.4
    assert errors[1] < errors[3] < 0.5
    assert error_of(logits_of(load(tmp_path, FORMS[0], "bfloat16")), exact) < 0.07


@pytest.mark.parametrize("family", ["qwen2", "llama", "chatglm2"])
def test_a_tied_head_is_an_int8_copy_of_its_own(tmp_path: Path, family: FamilyName) -> None:
    write_checkpoint(tmp_path, family, config={"tie_word_embeddings": True})
    exact = load(tmp_path, None)
    model = load(tmp_path, Quantization("int8"))
    assert isinstance(model.lm_head, Int8Linear)
    assert torch.equal(model.model.embed_tokens.weight, exact.model.embed_tokens.weight)
    held = model.lm_head.weight.float() * model.lm_head.scales[:, None]
    assert error_of(held, exact.lm_head.weight) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", FORMS, ids=str)
@pytest.mark.parametrize("family", ["chatglm2", "qwen2"])
def test_logits_are_bit_equal_alone_and_in_a_batch(
    tmp_path: Path, family: FamilyName, quantization: Quantization, dtype: Any
) -> None:
    """A whole model: its rows beside others whose embeddings are a hundred times larger."""
    write_checkpoint(tmp_path, family)
    model = load(tmp_path, quantization, dtype)
    embeddings = model.model.embed_tokens.weight[IDS]
    alone = logits_of_embeddings(model, embeddings)
    batch = torch.cat([embeddings * 100.0, embeddings, embeddings.flip(1) * 100.0])
    assert torch.equal(logits_of_embeddings(model, batch)[1:2], alone)


def logits_of_embeddings(model: transformers.PreTrainedModel, embeddings: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(inputs_embeds=embeddings).logits
    return logits


def test_weights_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    for value in (torch.inf, torch.nan):
        for quantization in FORMS[:2]:
            tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
            save_file(tensors, tmp_path / "model.safetensors")
            with pytest.raises(CheckpointError, match=r"up_proj\.weight: holds values that are not finite"):
                load(tmp_path, quantization)


def test_rows_and_groups_of_zeros_stay_zeros(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "model.safetensors")
    for value in tensors.values():
        if value.dim() == 2:
            value[::2] = 0.0
    save_file(tensors, tmp_path / "model.safetensors")
    for quantization in FORMS:
        assert torch.isfinite(logits_of(load(tmp_path, quantization))).all()


def test_an_unknown_group_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="group of 48"):
        Quantization("int4", 48)


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

checkpoint = Checkpoint.open(Path(sys.argv[1]))
quantization = Quantization(**json.loads(sys.argv[2]))
load_model(Checkpoint.open(Path(sys.argv[3])), dtype="bfloat16", quantization=quantization)  # everything is imported
before = peak = anonymous()
ended = threading.Event()
def watch():
    global peak
    while not ended.wait(0.002):
        peak = max(peak, anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(checkpoint, dtype="bfloat16", quantization=quantization)
ended.set()
watcher.join()
held = sum(value.numel() * value.element_size() for value in model.parameters())
print(json.dumps({"peak": max(peak, anonymous()) - before, "held": held}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("quantization", "layout"), [(Quantization("int8"), "bin"), (Quantization("int4", 64), "safetensors")], ids=str
)
def test_loading_never_holds_the_16_bit_model(tmp_path: Path, layout: Any, quantization: Quantization) -> None:
    """Peak anonymous memory while loading is what is held in the end, and less than one large tensor in 16 bits."""
    sizes = {
        "hidden_size": 1024,
        "ffn_hidden_size": 4096,
        "num_attention_heads": 16,
        "kv_channels": 64,
        "num_layers": 3,
    }
    write_checkpoint(tmp_path / "big", "chatglm2", dtype=torch.float16, layout=layout, config=sizes)
    write_checkpoint(tmp_path / "small", "chatglm2")
    num_16_bit_bytes = sum(file.stat().st_size for file in (tmp_path / "big").glob(f"*.{layout}"))
    asked = json.dumps({"name": quantization.name, "group_size": quantization.group_size})
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "big"), asked, str(tmp_path / "small")]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    measured = json.loads(result.stdout.splitlines()[-1])
    one_tensor = 2 * 8192 * 1024
    assert measured["held"] < 0.6 * num_16_bit_bytes
    assert measured["peak"] < measured["held"] + 1.5 * one_tensor
    assert measured["peak"] < 0.9 * num_16_bit_bytes
