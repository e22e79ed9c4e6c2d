"""Files that were damaged or made to do harm: each is refused in one line that names it, at once, and runs nothing."""

import io
import json
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.tokenizer import load_tokenizer
from fastchat.models.weights import load_model
from tests.checkpoints import write_checkpoint

MAX_SECONDS = 5.0
"""Of the whole attempt; a machine that is busy with other tests takes a while for anything."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", "llama", num_shards=1)


def refusal(folder: Path) -> str:
    """The one line that loading ends in."""
    began_at = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        load_model(Checkpoint.open(folder))
    assert time.process_time() - began_at < MAX_SECONDS
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    return caught.value.message


def write_config(folder: Path, change: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


def entry(start: Any, end: Any, dtype: Any = "F32", shape: Any = (1,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def file_of(header: object, num_data_bytes: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(num_data_bytes)


NORM = "model.norm.weight"
SAFETENSORS = {
    "nothing": b"",
    "half a length": b"\x10\x00\x00",
    "a length of 2 GB": struct.pack("<Q", 2**31) + b"{}",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 90 MB in a small file": struct.pack("<Q", 90_000_000) + b"{}",
    "no length": struct.pack("<Q", 0) + b"{}",
    "no JSON": file_of(b"no JSON at all"),
    "deep JSON": file_of(b"[" * 1_000_000),
    "a list": file_of([1, 2]),
    "a number": file_of(5),
    "no tensors": file_of({}, 0),
    "only metadata": file_of({"__metadata__": {"format": "pt"}}, 0),
    "an entry that is a number": file_of({NORM: 5}),
    "no offsets": file_of({NORM: {"dtype": "F32", "shape": [1]}}),
    "offsets as text": file_of({NORM: entry("0", "x")}),
    "negative offsets": file_of({NORM: entry(-4, 0)}, 0),
    "reversed offsets": file_of({NORM: entry(4, 0)}),
    "offsets beyond the file": file_of({NORM: entry(0, 2**20)}),
    "offsets of 2^63": file_of({NORM: entry(2**63, 2**63 + 4)}),
    "infinite offsets": file_of(b'{"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e400]}}'),
    "offsets that are no number": file_of({NORM: entry(0, float("nan"))}),
    "overlapping tensors": file_of({NORM: entry(0, 4), "lm_head.weight": entry(2, 6)}, 6),
    "a hole between tensors": file_of({NORM: entry(0, 4), "lm_head.weight": entry(8, 12)}, 12),
    "an unknown type": file_of({NORM: entry(0, 4, dtype="NaN")}),
    "a type that is a number": file_of({NORM: entry(0, 4, dtype=7)}),
    "a shape larger than its data": file_of({NORM: entry(0, 4, shape=[2**40])}),
    "a negative shape": file_of({NORM: entry(0, 4, shape=[-1])}),
    "a shape that overflows": file_of({NORM: entry(0, 4, shape=[2**32, 2**32])}),
    "bytes behind the last tensor": file_of({NORM: entry(0, 4)}, 100),
}


@pytest.mark.parametrize("content", SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_safetensors_file_that_is_not_sound_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    assert "model.safetensors: " in refusal(folder)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant, nobody can know."""
    folder = write_checkpoint(tmp_path, "llama", num_shards=2)
    from safetensors.torch import load_file, save_file

    first, second = sorted(folder.glob("*.safetensors"))
    tensors = load_file(second)
    name, value = next(iter(load_file(first).items()))
    save_file({**tensors, name: value + 1}, second)
    message = refusal(folder)
    assert second.name in message
    assert f"{name} is in another weight file" in message


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "a/b", 5, None, ""], ids=str)
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: Any) -> None:
    folder = write_checkpoint(tmp_path, "llama", num_shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {NORM: name}}))
    assert index.name in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 5], ids=str)
def test_an_index_without_files_is_refused(tmp_path: Path, weight_map: Any) -> None:
    folder = write_checkpoint(tmp_path, "llama", num_shards=2)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "no weight_map" in refusal(folder)


def zip_of(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return content.getvalue()


def saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


BIN = {
    "no archive": b"PK but no archive",
    "an archive of nothing": zip_of({}),
    "an archive of something else": zip_of({"x/readme.txt": b"hello"}),
    "a pickle that is cut short": zip_of({"archive/data.pkl": b"\x80\x02}"}),
    "a compressed bomb": zip_of({"archive/data.pkl": bytes(50_000_000)}, zipfile.ZIP_DEFLATED),
    "no tensors": saved({}),
    "a list": saved([torch.zeros(2)]),
    "a number among tensors": saved({NORM: torch.zeros(2), "step": 5}),
}


@pytest.mark.parametrize("content", BIN.values(), ids=BIN)
def test_a_bin_file_that_is_not_sound_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path, "llama", layout="bin", num_shards=1)
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin: " in refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 10**9},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**9},
        {"num_attention_heads": 10**9},
        {"head_dim": 10**30},
        {"rms_norm_eps": float("nan")},
        {"rope_theta": float("inf")},
        {"rope_scaling": {"type": "linear", "factor": "much"}},
        {"rope_scaling": {"type": "yarn", "factor": 1e300}},
    ],
    ids=str,
)
@pytest.mark.parametrize("step", [lambda checkpoint: checkpoint.max_context, load_tokenizer, load_model])
def test_absurd_numbers_are_refused_before_anything_is_allocated(
    folder: Path, change: dict[str, Any], step: Any
) -> None:
    """A size that no model has, a number that is none: whatever is read first."""
    write_config(folder, change)
    message = "config.json: "
    try:
        step(Checkpoint.open(folder))
    except CheckpointError as error:
        message = error.message
    else:
        assert "rope_scaling" in change, "only what reads the stretch refuses it"
    assert "config.json: " in message
    assert "\n" not in message


@pytest.mark.parametrize("ratio", ["x", -1, 0.0, True, {}], ids=str)
def test_a_stretch_of_chatglms_angles_that_is_no_number_is_refused(tmp_path: Path, ratio: Any) -> None:
    folder = write_checkpoint(tmp_path, "chatglm2", config={"rope_ratio": ratio})
    assert "rope_ratio must be a positive number" in refusal(folder)


@pytest.mark.parametrize(
    "option",
    [
        {"attn_implementation": "somebody/kernel"},
        {"attn_implementation": "flash_attention_2"},
        {"experts_implementation": "somebody/kernel"},
        {"return_dict": False},
        {"output_attentions": True},
        {"pad_token_id": 10**6},
        {"auto_map": {"AutoModelForCausalLM": "canary.Model"}},
    ],
    ids=str,
)
def test_config_chooses_no_code(tmp_path: Path, option: dict[str, Any]) -> None:
    """Keys that would choose a kernel, remote code or another kind of output are not handed on."""
    folder = write_checkpoint(tmp_path, "llama")
    plain = load_model(Checkpoint.open(folder), dtype="float32")
    write_config(folder, option)
    changed = load_model(Checkpoint.open(folder), dtype="float32")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(plain(ids).logits, changed(ids).logits)
    assert "/" not in str(changed.config._attn_implementation)
