"""The engine's laws with quantized weights: a request's answer is the same alone, in a crowd and after preemption."""

import pytest

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from fastchat.worker.engine_factory import EnginePlan
from fastchat.worker.engine_factory import make_engine as make_planned_engine
from tests.checkpoints import write_checkpoint
from tests.engine.conftest import answer_ids, run_all
from tests.engine.test_exactness import greedy, make_prompts, seeded

FORMS = [Quantization("int8"), Quantization("int4", 32), Quantization("int4", 128)]
KV_CACHE_BYTES = 4 * 2**20


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {
        family: write_checkpoint(tmp_path_factory.mktemp(family) / family, family) for family in ("chatglm2", "qwen2")
    }


def make_engine(folder, quantization, dtype="float32", *, num_tokens=4096, **config) -> Engine:
    model = load_model(Checkpoint.open(folder), dtype=dtype, quantization=quantization, on_progress=lambda *_: None)
    make_lean(model)
    kv_bytes = 2 * 2 * 2 * model.config.head_dim * model.dtype.itemsize if hasattr(model.config, "head_dim") else 0
    kv_bytes = kv_bytes or 2 * 2 * 2 * 12 * model.dtype.itemsize
    return Engine(model, EngineConfig(max_context=128, kv_cache_bytes=num_tokens * kv_bytes, block_size=4, **config))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", FORMS, ids=str)
@pytest.mark.parametrize("family", ["chatglm2", "qwen2"])
def test_greedy_answers_are_the_same_alone_and_among_others(folders, family, quantization, dtype):
    """Bit-equal logits: prompts come whole, so every product has the same rows but for their neighbours."""
    prompts = make_prompts(8, longest=40)
    engine = make_engine(folders[family], quantization, dtype)
    alone = [answer_ids(run_all(engine, [greedy(prompt)])["0"]) for prompt in prompts]
    crowd = run_all(
        make_engine(folders[family], quantization, dtype), [greedy(prompt, i) for i, prompt in enumerate(prompts)]
    )
    assert [answer_ids(crowd[str(index)]) for index in range(len(prompts))] == alone
    assert engine.limits.dtype == quantization.name


@pytest.mark.parametrize("quantization", FORMS[:2], ids=str)
def test_seeded_answers_survive_preemption(folders, quantization):
    prompts = make_prompts(10, longest=40)
    requests = [seeded(prompt, index, seed=index) for index, prompt in enumerate(prompts)]
    roomy = run_all(make_engine(folders["chatglm2"], quantization), requests)
    tight = make_engine(folders["chatglm2"], quantization, num_tokens=160)
    preempted = run_all(tight, requests)
    assert tight.stats.num_preemptions > 0
    assert [answer_ids(events) for events in preempted.values()] == [answer_ids(events) for events in roomy.values()]


@pytest.mark.parametrize("quantization", [None, *FORMS], ids=str)
def test_a_plan_crosses_a_process_border(folders, quantization):
    """As JSON, the group size with it."""
    plan = EnginePlan(
        path=str(folders["chatglm2"]),
        device="cpu",
        dtype="float32",
        quantization=quantization,
        max_context=128,
        max_batch_tokens=64,
        max_running=8,
        kv_cache_bytes=KV_CACHE_BYTES,
    )
    assert EnginePlan.from_json(plan.to_json()) == plan
    expected = "float32" if quantization is None else quantization.name
    assert make_planned_engine(EnginePlan.from_json(plan.to_json())).limits.dtype == expected
