"""Loaded modules compute what transformers and the original layout say, whatever the files look like."""

from __future__ import annotations

import contextlib
import logging
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from fastchat.errors import ConfigError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.footprint import Footprint
from fastchat.models.precision import has_fast_bfloat16
from fastchat.models.weights import load_model
from tests.checkpoints import FAMILIES, MISTRAL_WINDOW, NATIVE_FAMILIES, FamilyName, write_checkpoint, write_weights

IDS = torch.arange(3, 3 + 2 * MISTRAL_WINDOW + 5)[None] * 7 % 480
"""Longer than two of Mistral's windows."""


def logits_of(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@pytest.mark.parametrize("family", NATIVE_FAMILIES)
def test_logits_are_those_of_transformers_own_loader(tmp_path: Path, family: FamilyName) -> None:
    write_checkpoint(tmp_path, family)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(Checkpoint.open(tmp_path), dtype="float32")
    assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_saved_without_its_head_has_no_prefix(tmp_path: Path, tied: bool) -> None:
    """As embedding models are published; an output of its own keeps its name."""
    folder = write_checkpoint(tmp_path, "qwen3", num_shards=1, config={"tie_word_embeddings": tied})
    expected = logits_of(load_model(Checkpoint.open(folder), dtype="float32"))
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {name.removeprefix("model."): each for name, each in tensors.items()}, 1, "safetensors")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = logits_of(load_model(Checkpoint.open(folder), dtype="float32"))
    assert torch.equal(ours, expected)
    assert torch.equal(ours, logits_of(theirs))


@pytest.mark.parametrize("tied", [False, True])
def test_chatglm_is_glm_with_other_names(tmp_path: Path, tied: bool) -> None:
    """The same numbers under GlmForCausalLM's own names, split by hand, give the same logits."""
    write_checkpoint(tmp_path, "chatglm2", num_shards=1, config={"rope_ratio": 1, "tie_word_embeddings": tied})
    ours = load_model(Checkpoint.open(tmp_path), dtype="float32")
    renamed: dict[str, torch.Tensor] = {}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        if name.endswith("inv_freq"):
            continue
        new = name.replace("transformer.encoder.layers", "model.layers").replace(
            "self_attention.dense", "self_attn.o_proj"
        )
        new = new.replace("dense_h_to_4h", "gate_up_proj").replace("dense_4h_to_h", "down_proj")
        new = new.replace("transformer.encoder.final_layernorm", "model.norm")
        new = new.replace("transformer.embedding.word_embeddings", "model.embed_tokens")
        new = new.replace("transformer.output_layer", "lm_head")
        if "query_key_value" in new:
            for letter, part in zip("qkv", value.split([64, 32, 32]), strict=True):
                renamed[new.replace("self_attention.query_key_value", f"self_attn.{letter}_proj")] = part
        else:
            renamed[new] = value
    config = transformers.GlmConfig(
        vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, attention_bias=True, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    theirs = transformers.GlmForCausalLM(config)
    theirs.load_state_dict(renamed)
    assert torch.equal(logits_of(ours), logits_of(theirs.eval()))


@pytest.mark.parametrize(
    ("family", "angle"),
    [("chatglm2", lambda inverse: inverse / 4.0), ("chatglm3", lambda inverse: inverse)],
)
def test_rope_ratio_stretches_positions_in_chatglm2_and_the_base_in_chatglm3(
    tmp_path: Path, family: FamilyName, angle: Any
) -> None:
    write_checkpoint(tmp_path, family, config={"rope_ratio": 4})
    base = 10000.0 if family == "chatglm2" else 40000.0
    expected = angle(1.0 / base ** (torch.arange(0, 8, 2) / 8))
    frequencies = load_model(Checkpoint.open(tmp_path)).model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_files_of_every_layout_hold_the_same_model(tmp_path: Path, family: FamilyName) -> None:
    layouts: list[tuple[Any, int]] = [("safetensors", 1), ("safetensors", 5), ("bin", 1), ("bin", 4)]
    all_logits = []
    for layout, num_shards in layouts:
        folder = write_checkpoint(tmp_path / f"{layout}{num_shards}", family, layout=layout, num_shards=num_shards)
        all_logits.append(logits_of(load_model(Checkpoint.open(folder), dtype="float32")))
    assert all(torch.equal(logits, all_logits[0]) for logits in all_logits)


def test_safetensors_are_preferred_where_both_exist(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", layout="bin", seed=1)
    write_checkpoint(tmp_path, "llama", layout="safetensors", seed=2)
    only = write_checkpoint(tmp_path / "only", "llama", layout="safetensors", seed=2)
    both_logits = logits_of(load_model(Checkpoint.open(tmp_path), dtype="float32"))
    assert torch.equal(both_logits, logits_of(load_model(Checkpoint.open(only), dtype="float32")))


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_single_file_is_preferred_to_an_index(tmp_path: Path, layout: Any) -> None:
    """As in transformers: shards that were joined often leave their index behind."""
    write_checkpoint(tmp_path, "llama", layout=layout)
    for shard in tmp_path.glob(f"*.{layout}"):
        shard.unlink()
    write_checkpoint(tmp_path, "llama", layout=layout, num_shards=1)
    load_model(Checkpoint.open(tmp_path))


def test_tensors_may_be_parts_of_one_storage(tmp_path: Path) -> None:
    """Some tools cut what they save from one flat tensor; headers and loader know the parts apart."""
    folder = write_checkpoint(tmp_path, "llama", num_shards=1)
    expected = logits_of(load_model(Checkpoint.open(folder), dtype="float32"))
    footprint = Footprint.of(Checkpoint.open(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    pieces = torch.cat([each.flatten() for each in tensors.values()]).split([each.numel() for each in tensors.values()])
    parts = {name: piece.view(each.shape) for (name, each), piece in zip(tensors.items(), pieces, strict=True)}
    torch.save(parts, folder / "pytorch_model.bin")
    assert Footprint.of(Checkpoint.open(folder)).shapes == footprint.shapes
    assert torch.equal(logits_of(load_model(Checkpoint.open(folder), dtype="float32")), expected)


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.rotary_emb.cos_cached", "model.rotary_emb.original_inv_freq"]
)
def test_stored_rotary_angles_are_left_out(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, "llama", num_shards=1)
    expected = logits_of(load_model(Checkpoint.open(folder), dtype="float32"))
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {**tensors, name: torch.ones(8)}, 1, "safetensors")
    assert torch.equal(logits_of(load_model(Checkpoint.open(folder), dtype="float32")), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_all_weights_have_the_asked_type_and_angles_stay_float32(
    tmp_path: Path, family: FamilyName, dtype: Any
) -> None:
    write_checkpoint(tmp_path, family, dtype=torch.float16)
    model = load_model(Checkpoint.open(tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert model.dtype == model.config.dtype == getattr(torch, dtype)
    assert torch.isfinite(logits_of(model)).all()


def test_auto_is_bfloat16_on_processors_that_multiply_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", dtype=torch.float16)
    expected = torch.bfloat16 if has_fast_bfloat16() else torch.float32
    assert load_model(Checkpoint.open(tmp_path)).dtype == expected


@pytest.mark.parametrize(
    ("cpuinfo", "is_fast"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("processor\t: 0\nflags\t\t: fpu amx_bf16\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f\n", False),
        ("", False),
    ],
)
def test_fast_bfloat16_is_read_from_the_processors_flags(tmp_path: Path, cpuinfo: str, is_fast: bool) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert has_fast_bfloat16(tmp_path / "cpuinfo") is is_fast


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    wrong: Any = "int4"
    with pytest.raises(ConfigError, match="int4"):
        load_model(Checkpoint.open(tmp_path), dtype=wrong)


def test_a_tied_output_shares_the_embeddings_memory(tmp_path: Path) -> None:
    model = load_model(Checkpoint.open(write_checkpoint(tmp_path, "qwen2")))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_progress_is_told_before_the_first_shard_and_after_each(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=3)
    told: list[tuple[int, int]] = []
    load_model(Checkpoint.open(tmp_path), on_progress=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_progress_is_log_lines_where_there_is_no_terminal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=2)
    with caplog.at_level(logging.INFO):
        load_model(Checkpoint.open(tmp_path))
    assert "Loading checkpoint shards: 2/2" in caplog.text


def test_progress_is_a_bar_on_a_terminal() -> None:
    """The line of the guide, drawn on a pseudo-terminal."""
    program = (
        "from fastchat.models.progress import show_progress\n"
        "with show_progress(16) as report:\n"
        "    for number in range(17): report(number, 16)\n"
    )
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    try:
        subprocess.run([sys.executable, "-c", program], stderr=follower, check=True, timeout=60)
    finally:
        os.close(follower)
    with os.fdopen(leader, "rb") as terminal:
        shown = b"".join(pieces_of(terminal)).decode()
    assert "Loading checkpoint shards: 100%|" in shown
    assert re.search(r"\| 16/16 \[\d\d:\d\d<00:00,", shown)


def pieces_of(terminal: IO[bytes]) -> Iterator[bytes]:
    """All that was written, which comes in pieces; then Linux says that nobody is there to write more."""
    with contextlib.suppress(OSError):
        while piece := os.read(terminal.fileno(), 65536):
            yield piece


MEMORY_PROGRAM = """
import sys, threading
from pathlib import Path
import torch
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.weights import load_model

def anonymous_bytes():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

small, large = (Checkpoint.open(Path(path)) for path in sys.argv[1:])
load_model(small, dtype="float32")
before = peak = anonymous_bytes()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous_bytes())

watcher = threading.Thread(target=watch)
watcher.start()
model = load_model(large, dtype="float32")
done.set()
watcher.join()
sizes = [value.numel() * value.element_size() for value in model.parameters()]
print(before, max(peak, anonymous_bytes()), sum(sizes), max(sizes))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_loading_needs_the_weights_once_and_one_tensor(tmp_path: Path, layout: Any) -> None:
    """float16 files, held as float32: the peak of anonymous memory, beyond what the imports took."""
    size = {"hidden_size": 1024, "ffn_hidden_size": 4096, "kv_channels": 256, "num_layers": 4}
    large = write_checkpoint(
        tmp_path / "large", "chatglm2", dtype=torch.float16, layout=layout, num_shards=4, config=size
    )
    small = write_checkpoint(tmp_path / "small", "chatglm2", layout=layout)
    answer = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, str(small), str(large)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    before, peak, num_weight_bytes, num_largest_bytes = map(int, answer.stdout.split())
    assert num_weight_bytes > 200_000_000
    assert peak - before <= 1.15 * num_weight_bytes + num_largest_bytes
    assert peak <= 1.15 * num_weight_bytes + num_largest_bytes + 600_000_000
