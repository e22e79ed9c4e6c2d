"""What is said of a folder that is no model, or a damaged one: one line with the file and the remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat.errors import CheckpointError, UnsupportedModelError
from fastchat.models.adapter_folder import find_adapter
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.families import FAMILIES
from fastchat.models.weight_files import find_weight_files
from fastchat.models.weights import load_model
from tests.checkpoints import write_checkpoint, write_weights


def edit_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def message_of(action: Callable[[], object], kind: type[CheckpointError] = CheckpointError) -> str:
    with pytest.raises(kind) as caught:
        action()
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    message = message_of(lambda: Checkpoint.open(tmp_path / "chatglm2-6b"))
    assert f"{tmp_path}/chatglm2-6b: no such folder" in message


def test_a_name_of_the_hub_is_told_how_to_become_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded here."""
    monkeypatch.chdir(tmp_path)
    name = Path("THUDM/chatglm2-6b")
    assert "hf download THUDM/chatglm2-6b" in message_of(lambda: Checkpoint.open(name))
    assert "hf download" not in message_of(lambda: Checkpoint.open(tmp_path / "THUDM"))


@pytest.mark.skipif(sys.platform != "linux", reason="a file that cannot be read even by root is Linux's")
def test_what_the_system_does_not_let_us_read_is_named(tmp_path: Path) -> None:
    """A folder that cannot be looked at (here for the length of its name), and a file of weights whose disk fails."""
    long_name = tmp_path / ("x" * 300)
    assert f"{long_name}: cannot be read (File name too long)" in message_of(lambda: Checkpoint.open(long_name))
    assert "cannot be read" in message_of(lambda: find_adapter(long_name))
    folder = write_checkpoint(tmp_path / "model", "llama", num_shards=1)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/proc/self/mem")
    assert "model.safetensors: cannot be read (Input/output error)" in message_of(lambda: find_weight_files(folder))


def test_gguf_files_are_known(tmp_path: Path) -> None:
    """People who come from llama.cpp or Ollama have nothing else."""
    (tmp_path / "model-q4_0.gguf").touch()
    for path in (tmp_path, tmp_path / "model-q4_0.gguf"):
        assert "llama.cpp" in message_of(lambda path=path: Checkpoint.open(path))


def test_a_file_of_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert "a file; give the folder" in message_of(lambda: Checkpoint.open(tmp_path / "model.safetensors"))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    assert "no config.json" in message_of(lambda: Checkpoint.open(tmp_path))


def test_a_model_one_folder_down_is_pointed_at(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "inner", "llama")
    assert "in its folder 'inner'" in message_of(lambda: Checkpoint.open(tmp_path))


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "adapter" in message_of(lambda: Checkpoint.open(tmp_path))


def test_a_config_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "config.json: not valid JSON" in message_of(lambda: Checkpoint.open(tmp_path))


def test_an_unknown_architecture_lists_the_families_that_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    message = message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)
    assert "'rwkv'" in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "mrope"])
def test_angles_that_depend_on_the_batch_are_refused(tmp_path: Path, kind: str) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, rope_scaling={"rope_type": kind, "factor": 2.0})
    assert kind in message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)


def test_of_both_spellings_of_the_rotary_options_transformers_obeys_the_old_one(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, rope_parameters={"rope_type": "default"}, rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "dynamic" in message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)


def test_a_share_of_a_head_is_not_rotated_with_scaled_angles(tmp_path: Path) -> None:
    """transformers fails on it at the first token, but for GLM, whose classes know shares."""
    options = {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write_checkpoint(tmp_path / "llama", "llama", config=options)
    message = message_of(lambda: Checkpoint.open(tmp_path / "llama"), UnsupportedModelError)
    assert "partial_rotary_factor 0.5" in message
    Checkpoint.open(write_checkpoint(tmp_path / "glm", "glm", config=options))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8"])
def test_a_quantized_checkpoint_of_another_kind_is_refused_by_its_config(tmp_path: Path, method: str) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, quantization_config={"quant_method": method, "bits": 4})
    message = message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)
    assert f"quantized (quantization_config: {method})" in message
    assert "--quantize int8 or int4" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("multi_query_attention", False),
        ("rmsnorm", False),
        ("post_layer_norm", False),
        ("add_bias_linear", True),
        ("apply_residual_connection_post_layernorm", True),
        ("original_rope", False),
        ("quantization_bit", 2),
        ("pre_seq_len", 128),
        ("position_encoding_2d", True),
        ("kv_channels", None),
    ],
)
def test_a_chatglm_option_that_is_not_computed_is_refused_by_name(tmp_path: Path, option: str, value: object) -> None:
    write_checkpoint(tmp_path, "chatglm2")
    edit_config(tmp_path, **{option: value})
    message = message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)
    assert option in message or "first ChatGLM-6B" in message


@pytest.mark.parametrize("window", [{}, {"use_sliding_window": True, "sliding_window": None}])
def test_a_layer_that_slides_without_a_window_is_refused(tmp_path: Path, window: dict[str, Any]) -> None:
    options = {"layer_types": ["full_attention", "sliding_attention"]}
    write_checkpoint(tmp_path, "qwen3", config=options | {"use_sliding_window": True, "sliding_window": 8})
    Checkpoint.open(tmp_path)
    edit_config(tmp_path, **({"use_sliding_window": False} | window))
    assert "sliding_attention" in message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_tokens_is_refused_where_it_is_used(tmp_path: Path, family: Any, window: int) -> None:
    write_checkpoint(tmp_path, family)
    edit_config(tmp_path, sliding_window=window, use_sliding_window=True)
    assert f"sliding_window is {window}" in message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)
    edit_config(tmp_path, use_sliding_window=False, model_type="qwen2")
    Checkpoint.open(tmp_path)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_angles_for_one_kind_of_layers_are_refused(tmp_path: Path, family: Any) -> None:
    write_checkpoint(tmp_path, family)
    edit_config(tmp_path, rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}})
    assert "for full_attention alone" in message_of(lambda: Checkpoint.open(tmp_path), UnsupportedModelError)


def test_what_the_original_does_without_an_option_is_not_guessed(tmp_path: Path) -> None:
    """A missing multi_query_attention is False there, with rows of q, k and v in another order."""
    folder = write_checkpoint(tmp_path, "chatglm2")
    config = json.loads((folder / "config.json").read_text())
    del config["multi_query_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "multi_query_attention" in message_of(lambda: Checkpoint.open(folder), UnsupportedModelError)


def test_a_folder_without_weights_says_which_files_it_wants(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=1)
    (tmp_path / "model.safetensors").unlink()
    assert "no weights" in message_of(lambda: find_weight_files(tmp_path))


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_missing_shard_is_named(tmp_path: Path, layout: Any) -> None:
    write_checkpoint(tmp_path, "chatglm2", layout=layout, num_shards=3)
    missing = next(tmp_path.glob("*-00002-of-00003.*"))
    missing.unlink()
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert f"{missing}: missing" in message
    assert "download the 3 weight files again" in message


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("num_bytes_kept", [0.02, 0.5, 0.99])
def test_a_truncated_shard_is_named(tmp_path: Path, layout: Any, num_bytes_kept: float) -> None:
    write_checkpoint(tmp_path, "chatglm2", layout=layout)
    shard = next(tmp_path.glob("*-00002-of-00002.*"))
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * num_bytes_kept)])
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert f"{shard}: truncated or damaged" in message


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_git_lfs_pointer_is_told_from_weights(tmp_path: Path, layout: Any) -> None:
    write_checkpoint(tmp_path, "chatglm2", layout=layout)
    shard = next(tmp_path.glob("*-00001-of-00002.*"))
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 1\n")
    assert "git lfs pull" in message_of(lambda: find_weight_files(tmp_path))


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))
    assert "not the name of a file" in message_of(lambda: find_weight_files(tmp_path))


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_wrong_shape_names_tensor_file_and_both_shapes(tmp_path: Path, layout: Any) -> None:
    write_checkpoint(tmp_path, "chatglm2", layout=layout, num_shards=1)
    edit_config(tmp_path, ffn_hidden_size=104)
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    shapes = {"dense_h_to_4h": ("192 x 48", "208 x 48"), "dense_4h_to_h": ("48 x 96", "48 x 104")}
    found, expected = shapes["dense_h_to_4h" if "dense_h_to_4h" in message else "dense_4h_to_h"]
    assert message.startswith(str(next(tmp_path.glob(f"*.{layout}"))))
    assert f".weight has the shape {found}, but config.json asks for {expected}" in message


def _with_extra_tensor(folder: Path, name: str, value: torch.Tensor) -> None:
    write_checkpoint(folder, "llama", num_shards=1)
    from safetensors.torch import load_file

    write_weights(folder, {**load_file(folder / "model.safetensors"), name: value}, 2, "safetensors")
    (folder / "model.safetensors").unlink()


def test_an_unexpected_tensor_is_named(tmp_path: Path) -> None:
    _with_extra_tensor(tmp_path, "model.layers.7.extra.weight", torch.zeros(2))
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert "unexpected tensor model.layers.7.extra.weight" in message


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("model.layers.0.mlp.up_proj.weight_scale", "quantized"),
        ("model.layers.0.mlp.up_proj.qweight", "quantized in a way that is not read"),
        ("transformer.prefix_encoder.embedding.weight", "prefix encoder"),
    ],
)
def test_tensors_of_features_that_do_not_run_say_so(tmp_path: Path, name: str, phrase: str) -> None:
    _with_extra_tensor(tmp_path, name, torch.zeros(96))
    assert phrase in message_of(lambda: load_model(Checkpoint.open(tmp_path)))


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    _with_extra_tensor(tmp_path, "model.norm.weight", torch.zeros(48, dtype=torch.int8))
    assert "of type int8" in message_of(lambda: load_model(Checkpoint.open(tmp_path)), UnsupportedModelError)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", num_shards=1)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    write_weights(tmp_path, tensors, 1, "safetensors")
    assert "the weights lack model.norm.weight" in message_of(lambda: load_model(Checkpoint.open(tmp_path)))


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
def test_a_shard_without_a_tensor_that_the_index_lists_is_named(tmp_path: Path, layout: Any) -> None:
    write_checkpoint(tmp_path, "llama", layout=layout)
    index = next(tmp_path.glob("*.index.json"))
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    content["weight_map"]["model.norm.weight"] = shards[0]
    index.write_text(json.dumps(content))
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert f"{shards[0]}: lacks the tensor model.norm.weight" in message


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    """The restricted reader names no class of the file, so the command in it never runs."""

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    write_checkpoint(tmp_path, "llama", layout="bin", num_shards=1)
    torch.save({"model.norm.weight": Command()}, tmp_path / "pytorch_model.bin")
    assert "weights_only" in message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama", layout="bin", num_shards=1)
    torch.save({}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert "zip archive" in message_of(lambda: find_weight_files(tmp_path))


def test_a_value_of_the_wrong_type_in_the_config_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, num_hidden_layers="two")
    message = message_of(lambda: load_model(Checkpoint.open(tmp_path)))
    assert "config.json: transformers refuses it" in message
    assert "num_hidden_layers" in message


@pytest.mark.parametrize(
    ("config", "max_context"),
    [
        ({}, 512),
        ({"max_position_embeddings": 128}, 128),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 2048),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}}, 2048),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 512),
    ],
)
def test_max_context_counts_what_the_config_stretches(tmp_path: Path, config: dict[str, Any], max_context: int) -> None:
    write_checkpoint(tmp_path, "llama")
    edit_config(tmp_path, **config)
    assert Checkpoint.open(tmp_path).max_context == max_context


def test_the_name_is_the_folders_or_in_a_hub_cache_the_models(tmp_path: Path) -> None:
    cached = tmp_path / "models--THUDM--chatglm2-6b" / "snapshots" / "0123abcd"
    assert Checkpoint.open(write_checkpoint(cached, "chatglm2")).name == "chatglm2-6b"
    assert Checkpoint.open(write_checkpoint(tmp_path / "mine", "chatglm2")).name == "mine"
