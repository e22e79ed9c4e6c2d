"""The memory plan: true figures from headers alone, a fair share for each model, a remedy only where it helps."""

from dataclasses import replace

import pytest
import torch

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.errors import ConfigError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import DeviceMemory, find_device, may_have_accelerator
from fastchat.worker.memory_plan import CPU_ENGINE_BYTES, CPU_PROCESS_BYTES, plan_memory
from fastchat.worker.memory_remedy import find_remedy, refusal
from fastchat.worker.model_needs import PlannedModel
from tests.checkpoints import FAMILIES, write_checkpoint, write_hollow_checkpoint

GIB = 2**30
CHATGLM2_6B = {
    "num_layers": 28,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "num_attention_heads": 32,
    "multi_query_group_num": 2,
    "kv_channels": 128,
    "padded_vocab_size": 65024,
    "seq_length": 32768,
}
CPU = EngineSpec(device="cpu", dtype="bfloat16")


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory):
    """ChatGLM2-6B's headers, and nothing behind them."""
    folder = tmp_path_factory.mktemp("models") / "chatglm2-6b"
    return planned(write_hollow_checkpoint(folder, "chatglm2", dtype=torch.float16, config=CHATGLM2_6B))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return planned(write_checkpoint(tmp_path_factory.mktemp("models") / "small", "llama"))


def planned(folder):
    checkpoint = Checkpoint.open(folder)
    return PlannedModel.of(checkpoint, checkpoint.name)


def machine(num_bytes):
    return DeviceMemory("cpu", num_bytes)


def plan_of(models, engine, num_bytes, **options):
    return plan_memory(models, engine, machine(num_bytes), **options)


def test_real_shape_has_its_real_size(real_shape):
    """12.49 GB in 16 bits and 28 KiB of KV cache for a token: what the published checkpoint takes."""
    (share,) = plan_of([real_shape], CPU, 64 * GIB).shares
    assert f"{sum(share.needs.weight_bytes.values()) / 1e9:.2f}" == "12.49"
    assert share.needs.cache_bytes_per_token == 28 * 2 * 2 * 128 * 2
    assert share.context == 32768


def test_two_fit_at_int8_in_24_gib_and_in_bfloat16_they_do_not(real_shape):
    """On a CPU and on a GPU; and that is what the refusal says."""
    for device, budget in (("cpu", {"max_memory_bytes": 24 * GIB}), ("cuda", {"max_device_bytes": 24 * GIB})):
        memory = DeviceMemory(device, 64 * GIB)
        engine = EngineSpec(device=device, dtype="bfloat16", **budget)
        plan = plan_memory([real_shape] * 2, engine, memory)
        assert not plan.fits
        remedy = find_remedy(plan, [real_shape] * 2, engine, memory)
        assert remedy.flags == "--quantize int8"
        sentence = refusal(plan, remedy, memory)
        assert "together need at least" in sentence
        assert "25.77 GB (24.00 GiB)" in sentence
        assert "the same command with --quantize int8 fits" in sentence
        int8 = plan_memory([real_shape] * 2, replace(engine, quantization=Quantization("int8")), memory)
        assert int8.fits
        assert int8.total_bytes <= 24 * GIB
        assert all(share.context == 32768 for share in int8.shares)


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_and_engine_count_the_same_blocks(tmp_path, family):
    """What the plan gives, the engine takes: as many blocks, the same context, by the model's own configuration."""
    folder = write_checkpoint(tmp_path / family, family, layout="bin", dtype=torch.bfloat16)
    engine = EngineSpec(device="cpu", dtype="float32", max_running=3, max_context=300)
    (share,) = plan_of([planned(folder)], engine, 4 * GIB).shares
    model = load_model(Checkpoint.open(folder), dtype="float32", on_progress=lambda *_: None)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert sum(share.needs.weight_bytes.values()) == weights
    limits = Engine(model, EngineConfig(share.context, share.cache_bytes, max_running=3)).limits
    assert (limits.num_blocks * limits.block_size, limits.max_context) == (share.cache_tokens, 300)
    assert share.cache_tokens == 3 * 384


def test_cache_takes_what_the_budget_leaves_and_never_more(real_shape, small):
    """It grows with the budget up to what can be used; the whole stays within the budget."""
    tokens = []
    for num_gib in (15, 16, 20, 24, 2000):
        plan = plan_of([real_shape, small], replace(CPU, max_memory_bytes=num_gib * GIB), 0)
        assert plan.fits
        assert plan.total_bytes <= num_gib * GIB
        if num_gib < 2000:
            assert plan.total_bytes > num_gib * GIB - 2 * 28 * 4096 * 128
        tokens.append(plan.shares[0].cache_tokens)
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == 256 * 32768
    assert plan.shares[1].cache_tokens == 256 * 512


def test_models_share_fairly(real_shape):
    """Equal models get equal caches; one that was given an explicit size gets that size."""
    plan = plan_of([real_shape] * 3, replace(CPU, quantization=Quantization("int8")), 40 * GIB)
    assert len({share.cache_bytes for share in plan.shares}) == 1
    fixed = plan_of([real_shape], replace(CPU, kv_cache_bytes=GIB), 40 * GIB)
    assert GIB - fixed.shares[0].needs.block_bytes < fixed.shares[0].cache_bytes <= GIB


def test_context_shrinks_where_nobody_asked_for_one_and_is_refused_where_somebody_did(real_shape):
    """A length that was asked for is obeyed or refused; the refusal names a length that fits."""
    budget = replace(CPU, max_memory_bytes=13_300_000_000)
    plan = plan_of([real_shape], budget, 0)
    assert plan.fits
    assert 4096 <= plan.shares[0].context < 32768
    asked = replace(budget, max_context=32768)
    refused = plan_of([real_shape], asked, 0)
    assert not refused.fits
    assert refused.total_bytes > 13_300_000_000
    contexts = [16384, 8192, 4096]
    assert any(plan_of([real_shape], replace(asked, max_context=n), 0).fits for n in contexts)


def test_remedies_are_tried_before_they_are_named(real_shape):
    """The first that fits, with what least changes the answers first; none where none does."""
    found = []
    for num_gb in (14, 8, 5, 4, 1):
        engine = EngineSpec(device="cpu", dtype="float32", max_memory_bytes=num_gb * 10**9)
        plan = plan_of([real_shape], engine, 0)
        remedy = find_remedy(plan, [real_shape], engine, machine(0))
        assert remedy is None or remedy.plan.fits
        found.append(remedy and remedy.flags)
    assert found[:3] == ["--dtype bfloat16", "--quantize int8", "--dtype bfloat16 --quantize int4"]
    assert found[-1] is None
    assert refusal(plan, None, machine(0)).endswith("use a smaller model, or give more memory.")
    assert "the same command with --memory " in refusal(plan, None, machine(64 * GIB))


def test_workers_of_their_own_get_what_was_planned_for_them(real_shape, small):
    """Each share, planned again as a worker's own budget, gives the same; together they are within the whole."""
    engine = replace(CPU, max_memory_bytes=16 * GIB)
    plan = plan_of([real_shape, small], engine, 0, each_alone=True)
    assert plan.total_bytes <= 16 * GIB
    for model, share in zip([real_shape, small], plan.shares, strict=True):
        own = plan_of([model], replace(engine, max_memory_bytes=plan.own_budget(share)), 0)
        assert own.fits
        assert own.shares[0].cache_tokens == share.cache_tokens
        assert own.shares[0].context == share.context


def test_engines_in_processes_of_their_own_count(small):
    """Libraries are there once for each process."""
    thread, process = (plan_of([small] * 2, replace(CPU, engine_place=place), GIB) for place in ("thread", "process"))
    assert thread.process_bytes == CPU_PROCESS_BYTES + 2 * CPU_ENGINE_BYTES
    assert process.process_bytes == thread.process_bytes + 2 * CPU_PROCESS_BYTES


def test_flag_of_the_other_device_is_refused(small):
    """A budget that says nothing is not accepted."""
    with pytest.raises(ConfigError, match=r"--max-gpu-memory says nothing here.*use --memory"):
        plan_of([small], replace(CPU, max_device_bytes=GIB), GIB)
    with pytest.raises(ConfigError, match=r"--memory says nothing here.*use --max-gpu-memory"):
        plan_memory([small], replace(CPU, max_memory_bytes=GIB), DeviceMemory("cuda", GIB))


def test_cache_without_room_for_a_block_is_refused(real_shape):
    with pytest.raises(ConfigError, match="holds no block of 128 tokens"):
        plan_of([real_shape], replace(CPU, kv_cache_bytes=10**6), 64 * GIB)


def test_without_a_budget_a_margin_is_left(small):
    """A tenth of what is free, for whatever else needs memory."""
    assert plan_of([small], CPU, 20 * GIB).budget.num_bytes == 18 * GIB
    assert plan_of([small], CPU, GIB).budget.num_bytes == GIB // 2
    assert plan_of([small], CPU, 0).budget.num_bytes == 0


def test_device_is_found_without_torch_where_there_is_no_accelerator(tmp_path):
    (tmp_path / "dev").mkdir()
    assert not may_have_accelerator(tmp_path)
    (tmp_path / "dev" / "nvidiactl").touch()
    assert may_have_accelerator(tmp_path)
    if not may_have_accelerator():
        with pytest.raises(ConfigError, match="torch finds no such device here"):
            find_device("cuda")
