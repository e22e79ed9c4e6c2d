"""LoRA adapters on one base: a sequence's text is that of the merged model, whoever is beside it in the batch."""

import pytest
import torch

from fastchat.engine.engine import Engine
from fastchat.engine.engine_config import EngineConfig
from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.adapters import ModelAdapters
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lean import make_lean
from fastchat.models.stored_form import Quantization
from fastchat.models.weights import load_model
from tests.adapters import modules_of, write_lora, write_merged
from tests.checkpoints import write_checkpoint
from tests.engine.conftest import answer_ids, run_all

FAMILIES = ("chatglm2", "glm", "llama", "qwen2", "qwen3", "mistral")
TWO_LAYOUTS = pytest.mark.parametrize("family", ["chatglm2", "llama"], indirect=True)


def make(folder, *, lean=True, dtype="float32", quantization=None, adapters=(), kv_cache_bytes=2**21):
    checkpoint = Checkpoint.open(folder)
    model = load_model(checkpoint, dtype=dtype, quantization=quantization)
    if lean:
        make_lean(model)
    config = EngineConfig(max_context=256, kv_cache_bytes=kv_cache_bytes, block_size=8, max_batch_tokens=32)
    engine = Engine(model, config, ModelAdapters(model, checkpoint))
    for name, source in adapters:
        engine.adapters.add(name, str(source))
    return engine


def request(name, prompt, adapter="", *, num_tokens=12):
    return SequenceRequest(name, tuple(prompt), SamplingParams(max_tokens=num_tokens, temperature=0.0), adapter=adapter)


def greedy(engine, prompt, adapter="", **options):
    return answer_ids(run_all(engine, [request("alone", prompt, adapter, **options)])["alone"])


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def written(tmp_path_factory, family):
    """A base, two adapters and the two merged checkpoints."""
    root = tmp_path_factory.mktemp(family)
    base = write_checkpoint(root / "base", family)
    folders = {"base": base}
    for seed, name in enumerate(("one", "two")):
        changes = write_lora(root / name, base, modules_of(family), seed=seed, rank=4 + 3 * seed)
        folders[name] = root / name
        folders[f"merged-{name}"] = write_merged(root / f"merged-{name}", base, changes)
    return folders


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "own-layers"])
def test_an_adapter_gives_the_text_of_the_merged_model(written, lean):
    """In float32 token for token, mixed in one batch with another adapter and with the base itself."""
    names = ("one", "two")
    engine = make(written["base"], lean=lean, adapters=[(name, written[name]) for name in names])
    prompts = {f"{name}-{n}": [7 + 3 * n + i for i in range(5 + 9 * n)] for n in range(3) for name in ("", *names)}
    together = run_all(engine, [request(key, prompt, key.split("-")[0]) for key, prompt in prompts.items()])
    for name in ("", *names):
        alone = make(written[f"merged-{name}" if name else "base"], lean=lean)
        for key, prompt in prompts.items():
            if key.split("-")[0] == name:
                assert answer_ids(together[key]) == greedy(alone, prompt), key
    assert len({tuple(answer_ids(together[f"{name}-2"])) for name in ("", *names)}) == 3


@TWO_LAYOUTS
def test_the_prefix_cache_never_crosses_adapters(written):
    """Keys and values of one prompt differ by adapter, and by what a name stood for."""
    prompt = list(range(20, 70))
    engine = make(written["base"], adapters=[("a", written["one"]), ("b", written["two"])])
    expected = {name: greedy(make(written[folder]), prompt) for name, folder in MERGED.items()}
    for name in ("a", "b", "", "b", "", "a"):
        assert greedy(engine, prompt, name) == expected[name]
    assert engine.stats.num_cached_tokens >= 3 * 40, "equal prefixes of one adapter are shared"
    engine.adapters.remove("a")
    engine.adapters.add("a", str(written["two"]))
    assert greedy(engine, prompt, "a") == expected["b"]


MERGED = {"": "base", "a": "merged-one", "b": "merged-two"}


@TWO_LAYOUTS
def test_a_removed_adapter_finishes_what_runs_and_takes_nothing_new(written):
    """Its sequences keep it; a new request for it ends with an error of its own."""
    engine = make(written["base"], adapters=[("one", written["one"])])
    expected = greedy(engine, (5, 6, 7), "one")
    engine.add(request("running", (5, 6, 7), "one"))
    events = engine.step()
    engine.adapters.remove("one")
    refused = engine.add(request("late", (5, 6, 7), "one"))
    assert refused.finish_reason is FinishReason.ERROR
    assert "removed" in refused.error
    while engine.has_work:
        events += engine.step()
    assert answer_ids(events) == expected
    assert engine.is_empty


@TWO_LAYOUTS
@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", 32)], ids=str)
def test_over_quantized_weights_an_adapter_stays_within_their_tolerance(written, quantization):
    """The change is not quantized: what differs from the exact merged model is the base's rounding alone."""
    hidden = {}
    for name, source, options in (
        ("exact", "merged-one", {}),
        ("rounded", "merged-one", {"quantization": quantization}),
        ("adapted", "base", {"quantization": quantization, "adapters": [("one", written["one"])]}),
    ):
        engine = make(written[source], **options)
        hidden[name] = embedding(engine, "one" if name == "adapted" else "")
    norm = hidden["exact"].norm()
    tolerance = (hidden["rounded"] - hidden["exact"]).norm() / norm
    assert (hidden["adapted"] - hidden["exact"]).norm() / norm < max(1.5 * tolerance, 0.02)


def embedding(engine, adapter):
    asked = SequenceRequest(
        "embedded", tuple(range(30, 60)), SamplingParams(max_tokens=0), wants_embedding=True, adapter=adapter
    )
    return torch.tensor(run_all(engine, [asked])["embedded"][-1].embedding)


@TWO_LAYOUTS
def test_a_row_has_the_same_bits_whoever_is_beside_it(written):
    """Also in bfloat16: logits of a decoding row do not depend on its mates or on their adapters."""
    engine = make(written["base"], dtype="bfloat16", adapters=[("one", written["one"]), ("two", written["two"])])
    alone = {name: logprobs(run_all(engine, [probed(name, name)])[name]) for name in ("", "one", "two")}
    for names in (("one", "two"), ("", "one"), ("two", "", "one")):
        events = run_all(engine, [probed(name, name) for name in names])
        for name in names:
            assert logprobs(events[name]) == alone[name]


def probed(name, adapter):
    sampling = SamplingParams(max_tokens=6, temperature=0.0, top_logprobs=3)
    return SequenceRequest(name, (9, 8, 7, 6), sampling, adapter=adapter)


def logprobs(events):
    return [entry for event in events for entry in event.logprobs]
