"""Lean layers compute what transformers' own layers compute, with one copy of every weight."""

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from tests.checkpoints import FAMILIES, write_checkpoint

NUM_TOKENS = 40


@pytest.fixture(scope="module", autouse=True)
def causal_attention():
    """An attention that needs no mask, as the engine's: each of one packed sequence's tokens sees those before it."""

    def attend(module, query, key, value, _mask, **options):
        options.pop("is_causal", None)
        mask = torch.ones(NUM_TOKENS, NUM_TOKENS, dtype=torch.bool).tril()
        window = options.pop("sliding_window", None)
        if window is not None:
            mask = mask.triu(1 - window)
        return sdpa_attention_forward(module, query, key, value, mask[None, None], **options)

    AttentionInterface.register("lean_test", attend)
    AttentionMaskInterface.register("lean_test", lambda *_, **__: None)


def hidden_states(model: PreTrainedModel) -> Tensor:
    model.set_attn_implementation("lean_test")
    for attention in model.modules():
        if hasattr(attention, "o_proj"):  # read by transformers' function alone
            attention.num_key_value_groups = model.config.num_attention_heads // model.config.num_key_value_heads
    ids = torch.randint(3, 200, (1, NUM_TOKENS), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(100, 100 + NUM_TOKENS).unsqueeze(0)
    with torch.inference_mode():
        return model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_lean_layers_equal_the_familys_own(tmp_path, family, dtype, tolerance):
    """The final hidden states agree to rounding, with sliding windows and norms of single heads too."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / family, family))
    plain, lean = (load_model(checkpoint, dtype=dtype) for _ in range(2))
    make_lean(lean)
    expected, found = hidden_states(plain).float(), hidden_states(lean).float()
    assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", 32)], ids=str)
def test_lean_layers_of_quantized_weights_equal_the_familys_own(tmp_path, family, quantization):
    """Joined rows keep their scales. What differs is rounding outside of products, which may move a code by one."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / family, family))
    plain, lean = (load_model(checkpoint, dtype="float32", quantization=quantization) for _ in range(2))
    make_lean(lean)
    expected, found = hidden_states(plain), hidden_states(lean)
    assert (found - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantization", [None, Quantization("int8"), Quantization("int4", 32)], ids=str)
def test_joining_holds_each_weight_once(tmp_path, family, quantization):
    """The joined projections replace their parts: as many numbers as before, whatever the family."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / family, family))
    model = load_model(checkpoint, quantization=quantization)
    before = sum(parameter.numel() for parameter in model.parameters())
    make_lean(model)
    assert sum(parameter.numel() for parameter in model.parameters()) == before
    assert any("qkv_proj" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("family", ["glm", "llama"])
def test_a_window_that_transformers_does_not_read_is_none(tmp_path, family):
    """Some config.json name a sliding window though their family has none."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / family, family, config={"sliding_window": 4}))
    plain, lean = (load_model(checkpoint, dtype="float32") for _ in range(2))
    make_lean(lean)
    expected, found = hidden_states(plain), hidden_states(lean)
    assert (found - expected).norm() / expected.norm() < 1e-5


def test_another_activation_keeps_its_own_layers(tmp_path):
    """What the lean layer does not compute is left as it is."""
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "llama", "llama", config={"hidden_act": "gelu"}))
    model = load_model(checkpoint)
    make_lean(model)
    assert not any("qkv_proj" in name for name, _ in model.named_parameters())
