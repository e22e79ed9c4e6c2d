"""Bit-identical tensors of two models are held once, found by content, and freed with the last model that sees them."""

import gc

import pytest
import torch

from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.shared_tensors import PROCESS_TENSORS, SharedTensors
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from tests.adapters import base_tensors, write_merged
from tests.checkpoints import write_checkpoint

LAYERS = {"num_hidden_layers": 4, "num_layers": 4}
FORMS = [None, Quantization("int8"), Quantization("int4", 32)]


def loaded(folder, quantization=None):
    model = load_model(Checkpoint.open(folder), dtype="float32", quantization=quantization)
    make_lean(model)
    return model


def held_bytes(*models):
    """Memory, each piece counted once."""
    pieces = {}
    for model in models:
        for parameter in model.parameters():
            pieces[parameter.untyped_storage().data_ptr()] = parameter.untyped_storage().nbytes()
    return sum(pieces.values())


@pytest.fixture(scope="module", params=["chatglm2", "qwen2"])
def folders(request, tmp_path_factory):
    """A base, and a fine-tune of it that shares all but its last layer."""
    root = tmp_path_factory.mktemp("shared")
    base = write_checkpoint(root / "base", request.param, seed=4711, config=LAYERS)  # of no other test
    changes = {
        name: 0.1 * torch.ones_like(value)
        for name, value in base_tensors(base).items()
        if ".layers.3." in name and name.endswith("weight")
    }
    return base, write_merged(root / "tuned", base, changes)


@pytest.mark.parametrize("quantization", FORMS, ids=str)
def test_a_fine_tune_takes_only_what_differs(folders, quantization):
    """Joined projections too, in every form; the numbers of both models stay their own."""
    gc.collect()
    before = PROCESS_TENSORS.saved_bytes
    base, tuned = (loaded(folder, quantization) for folder in folders)
    own = held_bytes(base)
    last = sum(p.untyped_storage().nbytes() for p in tuned.get_decoder().layers[3].parameters())
    assert own < held_bytes(base, tuned) <= own + last
    assert PROCESS_TENSORS.saved_bytes - before == pytest.approx(own - last, rel=0.02)
    alone = loaded(folders[1], quantization)
    assert all(torch.equal(parameter, alone.get_parameter(name)) for name, parameter in tuned.named_parameters())
    del alone, tuned
    gc.collect()
    assert held_bytes(base) == own
    assert PROCESS_TENSORS.saved_bytes == before


def test_memory_lives_as_long_as_anybody_sees_it(folders):
    """The model that was there first may go; a third still finds what the second holds; then all is free."""
    gc.collect()
    before = PROCESS_TENSORS.saved_bytes
    first, second = loaded(folders[0]), loaded(folders[1])
    expected = {name: parameter.clone() for name, parameter in second.named_parameters()}
    del first
    gc.collect()
    third = loaded(folders[1])
    assert held_bytes(second, third) == held_bytes(second)
    del second
    gc.collect()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in third.named_parameters())
    del third
    gc.collect()
    assert PROCESS_TENSORS.saved_bytes == before


def test_only_equal_bits_are_shared():
    """Neither the sign of a zero, nor a type, nor one bit between the samples is overlooked."""
    pool = SharedTensors()
    zeros = torch.zeros(64, 64)
    first = pool.hold(zeros)
    assert pool.hold(torch.zeros(64, 64)).data_ptr() == first.data_ptr()
    others = [torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(32, 128)]
    others[0][63, 5] = -0.0
    others[1][17, 3] = 1e-40
    held = [pool.hold(other) for other in others]
    assert len({each.data_ptr() for each in (first, *held)}) == 5
    strange = torch.full((64, 64), float("nan"))
    assert pool.hold(strange.clone()).data_ptr() != pool.hold(zeros + 1).data_ptr()
    kept = pool.hold(strange)
    assert pool.hold(strange.clone()).data_ptr() == kept.data_ptr()
