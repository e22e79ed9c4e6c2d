"""Which folders are adapters, whose they are, and which of them are refused, before a weight is read or after."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastchat.errors import CheckpointError, ConfigError
from fastchat.models.adapter_folder import find_adapter
from fastchat.models.adapters import ModelAdapters
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.weights import load_model
from fastchat.worker.config import ModelSpec
from fastchat.worker.model_groups import group_models
from fastchat.worker.model_needs import PlannedModel
from tests.adapters import write_lora
from tests.checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("bases") / "small-llama", "llama")


@pytest.fixture
def adapter(tmp_path, base):
    write_lora(tmp_path / "style", base, ("q_proj", "down_proj"))
    return tmp_path / "style"


def rewrite(adapter, **options):
    """The same adapter, its config changed."""
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def test_the_base_is_found_by_folder_by_name_or_beside_the_adapter(base, adapter, tmp_path):
    """As the config says where it can be followed; the command's own word comes first."""
    for specs in ((adapter,), (base, adapter), (adapter, base)):
        (group,) = group_models([ModelSpec(path) for path in specs])
        assert group.checkpoint.path == base
        assert group.all_names == ("small-llama", "style")
    rewrite(adapter, base_model_name_or_path="someone/small-llama")
    (group,) = group_models([ModelSpec(base, ("a",)), ModelSpec(adapter, ("b", "c"))])
    assert group.all_names == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"'someone/small-llama'.*--model-path BASE\+"):
        group_models([ModelSpec(adapter)])
    other = write_checkpoint(tmp_path / "other", "llama", seed=3)
    (group,) = group_models([ModelSpec(type(adapter)(f"{other}+{adapter}"))])
    assert group.checkpoint.path == other
    rewrite(adapter, base_model_name_or_path="../other")
    (group,) = group_models([ModelSpec(adapter)])
    assert group.checkpoint.path.samefile(other)


def test_names_are_unique_and_a_model_is_no_adapter(base, adapter, tmp_path):
    """A merged folder that kept its adapter_config.json is a model; a plus in a folder's name is a letter."""
    with pytest.raises(ConfigError, match="Two models are named 'x'"):
        group_models([ModelSpec(base, ("x",)), ModelSpec(adapter, ("x",))])
    with pytest.raises(ConfigError, match="holds no adapter"):
        group_models([ModelSpec(type(base)(f"{base}+{base}"))])
    merged = write_checkpoint(tmp_path / "merged+more", "llama")
    (merged / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    assert find_adapter(merged) is None
    (group,) = group_models([ModelSpec(merged)])
    assert group.adapters == ()


def test_the_plan_counts_what_an_adapter_holds(base, adapter):
    """From the header, to the byte."""
    planned = PlannedModel.of(Checkpoint.open(base), "x", [find_adapter(adapter)])
    loaded = loaded_with(base, adapter)
    assert planned.num_adapter_values * 4 == loaded.num_bytes > 0


def loaded_with(base, adapter):
    checkpoint = Checkpoint.open(base)
    return ModelAdapters(load_model(checkpoint, dtype="float32"), checkpoint).load(str(adapter))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type is 'PREFIX_TUNING'"),
        ({"use_dora": True}, "use_dora is set"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set"),
        ({"layer_replication": [[0, 1]]}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow is set"),
    ],
)
def test_an_option_that_is_not_computed_is_refused_by_name(adapter, options, told):
    """In one line that names the file, and before anything is loaded."""
    rewrite(adapter, **options)
    with pytest.raises(CheckpointError, match=told) as refusal:
        group_models([ModelSpec(adapter)])
    assert str(adapter / "adapter_config.json") in refusal.value.message
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t, k: {k.replace("lora_A", "lora_magnitude_vector"): t[k]}, "belongs to DoRA"),
        (lambda _t, _k: {"base_model.model.lm_head.weight": torch.ones(4, 4)}, "no LoRA matrix"),
        (lambda t, k: {k: t[k][:, :-1].contiguous()}, "is of another model"),
        (lambda t, k: {k: t[k] * float("nan")}, "not finite"),
        (lambda t, k: {k.replace("layers.0", "layers.7"): t[k]}, "only one of lora_A and lora_B|does not have"),
        (lambda t, k: {k: t[k][:-1]}, "is of another model|says 4"),
        (lambda t, k: {k.replace("q_proj", "z_proj"): t[k]}, "only one of|does not have"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(base, adapter, change, told):
    """One line, whatever is in the file."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.0.self_attn.q_proj.lora_A" in name)
    save_file({**{key: value for key, value in tensors.items() if key != name}, **change(tensors, name)}, file)
    with pytest.raises(CheckpointError, match=told) as refusal:
        loaded_with(base, adapter)
    assert "\n" not in refusal.value.message


def test_scales_follow_peft(base, tmp_path):
    """alpha / r, alpha / sqrt(r), and patterns that are the end of a module's name."""
    write_lora(tmp_path / "plain", base, ("q_proj",), rank=4, lora_alpha=10)
    module = "model.layers.0.self_attn.q_proj"
    assert find_adapter(tmp_path / "plain").scale_of(module, 4) == 2.5
    write_lora(tmp_path / "rs", base, ("q_proj",), rank=4, lora_alpha=10, use_rslora=True)
    assert find_adapter(tmp_path / "rs").scale_of(module, 4) == 5
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 3, "v_proj": 9}}
    write_lora(tmp_path / "own", base, ("q_proj", "v_proj"), rank=4, lora_alpha=10, **patterns)
    own = find_adapter(tmp_path / "own")
    assert own.scale_of(module, 2) == 1.5
    assert own.scale_of("model.layers.1.self_attn.q_proj", 2) == 5
    assert own.scale_of("model.layers.1.self_attn.v_proj", 4) == 9 / 4
    with pytest.raises(CheckpointError, match="different adapters"):
        own.scale_of("model.layers.1.self_attn.v_proj", 3)
