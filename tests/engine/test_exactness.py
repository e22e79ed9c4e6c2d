"""Laws of what comes out, whatever else the engine is doing."""

import random

import pytest
import torch

from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.lean import make_lean
from fastchat.native import attention as native_attention
from fastchat.native.products import MAX_ROWS
from tests.engine.conftest import answer_ids, make_engine, run_all
from tests.engine.tiny_models import FAMILIES, VOCAB_SIZE, make_model

NUM_NEW = 24


def make_prompts(count: int, longest: int = 60) -> list[tuple[int, ...]]:
    generator = random.Random(7)
    return [
        tuple(generator.randrange(3, VOCAB_SIZE) for _ in range(generator.randint(1, longest))) for _ in range(count)
    ]


def greedy(prompt, index=0, max_tokens=NUM_NEW, **sampling) -> SequenceRequest:
    return SequenceRequest(
        str(index), tuple(prompt), SamplingParams(max_tokens=max_tokens, temperature=0.0, **sampling)
    )


def reference_ids(model, prompt, num_new=NUM_NEW) -> list[int]:
    """transformers' own generate, one prompt alone, with its own attention."""
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("block_size", "num_blocks", "max_batch_tokens"),
    [(8, 400, 512), (128, 20, 7), (4, 44, 16)],
    ids=["roomy", "tiny chunks", "preempting"],
)
def test_greedy_equals_generate(family, block_size, num_blocks, max_batch_tokens):
    """In float32 every greedy answer is what transformers' `generate` gives for that prompt alone."""
    model = make_model(family)
    prompts = make_prompts(12)
    expected = [reference_ids(model, prompt) for prompt in prompts]
    engine = make_engine(
        model, num_blocks=num_blocks, block_size=block_size, max_batch_tokens=max_batch_tokens, max_context=128
    )
    events = run_all(engine, [greedy(prompt, index) for index, prompt in enumerate(prompts)])
    assert [answer_ids(events[str(index)]) for index in range(len(prompts))] == expected
    assert (engine.stats.num_preemptions > 0) == (num_blocks == 44)


def test_late_arrivals_change_nothing(glm):
    """A sequence gives the same ids whether others arrive while it runs or not."""
    prompts = make_prompts(8)
    expected = [reference_ids(glm, prompt) for prompt in prompts]
    engine = make_engine(glm, max_batch_tokens=32)
    ids: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    for index, prompt in enumerate(prompts):
        engine.add(greedy(prompt, index))
        for event in engine.step():
            ids[event.sequence_id] += event.token_ids
    while engine.has_work:
        for event in engine.step():
            ids[event.sequence_id] += event.token_ids
    assert list(ids.values()) == expected


def seeded(prompt, index, seed, choice=0) -> SequenceRequest:
    sampling = SamplingParams(max_tokens=NUM_NEW, temperature=1.0, top_p=0.95, seed=seed, choice=choice)
    return SequenceRequest(str(index), tuple(prompt), sampling)


def test_same_seed_same_ids_alone_in_a_crowd_and_after_preemption(glm):
    """A seeded answer does not depend on its batch mates, nor on being preempted."""
    prompts = make_prompts(32)
    requests = [seeded(prompt, index, seed=index + 1000) for index, prompt in enumerate(prompts)]
    alone = [answer_ids(run_all(make_engine(glm), [request])[request.sequence_id]) for request in requests]
    crowd = run_all(make_engine(glm), requests)
    tight = make_engine(glm, num_blocks=24, block_size=4, max_context=96)
    preempted = run_all(tight, requests)
    assert tight.stats.num_preemptions > 0
    assert [answer_ids(crowd[request.sequence_id]) for request in requests] == alone
    assert [answer_ids(preempted[request.sequence_id]) for request in requests] == alone


def test_choices_of_one_seed_differ(glm):
    """`n` choices share the seed and still go different ways."""
    prompt = make_prompts(1)[0]
    events = run_all(make_engine(glm), [seeded(prompt, choice, seed=5, choice=choice) for choice in range(4)])
    assert len({tuple(answer_ids(events[str(choice)])) for choice in range(4)}) == 4


@pytest.mark.parametrize("family", ["glm", "mistral"])
def test_prefix_cache_changes_no_ids_and_saves_prompt_tokens(family):
    """A prompt that was seen before is not computed again, and gives the same answer; with a sliding window too."""
    model = make_model(family)
    prompt = make_prompts(1, longest=60)[0] + tuple(range(3, 60))
    expected = reference_ids(model, prompt)
    engine = make_engine(model, block_size=8)
    first = run_all(engine, [greedy(prompt)])["0"]
    second = run_all(engine, [greedy(prompt)])["0"]
    assert answer_ids(first) == answer_ids(second) == expected
    assert first[0].num_cached_tokens == 0
    assert second[0].num_cached_tokens == (len(prompt) - 1) // 8 * 8


@pytest.mark.parametrize("family", ["glm", "mistral"])
def test_shared_prefixes_survive_preemption(family):
    """Prompts that share a beginning, in a cache too small for all of them: found, lost, computed again, all right."""
    model = make_model(family)
    beginning = tuple(range(3, 40))
    prompts = [beginning + prompt[:20] for prompt in make_prompts(10)]
    expected = [reference_ids(model, prompt) for prompt in prompts]
    engine = make_engine(model, num_blocks=40, block_size=4, max_batch_tokens=24, max_context=96)
    for _ in range(2):
        events = run_all(engine, [greedy(prompt, index) for index, prompt in enumerate(prompts)])
        assert [answer_ids(events[str(index)]) for index in range(len(prompts))] == expected
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_cached_tokens > 0


@pytest.mark.skipif(not native_attention.is_available(torch.float32), reason="there are no kernels here")
@pytest.mark.parametrize("family", ["qwen2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_depends_on_where_a_prompt_is_cut(family, dtype):
    """Cached or not, in parts of any size, beside others: log probabilities are the same numbers."""
    model = make_model(family, dtype)
    for parameter in model.get_decoder().layers.parameters():
        parameter.mul_(10.0)  # so that what attention gives is not lost in the embeddings
    make_lean(model)
    prompt = tuple(3 + place * 7 % 500 for place in range(MAX_ROWS - 1))  # more rows may be torch's to multiply
    request = greedy(prompt, top_logprobs=3)

    def said(engine, *others):
        events = run_all(engine, [*others, request])["0"]
        return [entry for event in events for entry in event.logprobs]

    expected = said(make_engine(model))
    for size in (1, 5, 16, 23, 30):
        assert said(make_engine(model, max_batch_tokens=size)) == expected
    others = [greedy(prompt[number + 1 :], f"o{number}") for number in range(3)]
    assert said(make_engine(model, max_batch_tokens=MAX_ROWS), *others) == expected
    for cached in (30, 24, 16):
        engine = make_engine(model, block_size=2)
        run_all(engine, [greedy(prompt[:cached], "before", max_tokens=1)])
        assert said(engine) == expected


def test_prefix_cache_is_not_shared_between_salts(glm):
    """What one tenant computed, another can not find out."""
    prompt = tuple(range(3, 60))
    engine = make_engine(glm, block_size=8)
    sampling = SamplingParams(max_tokens=1, temperature=0.0)
    run_all(engine, [SequenceRequest("a", prompt, sampling, cache_salt="alice")])
    other = run_all(engine, [SequenceRequest("b", prompt, sampling, cache_salt="bob")])["b"]
    same = run_all(engine, [SequenceRequest("c", prompt, sampling, cache_salt="alice")])["c"]
    assert other[0].num_cached_tokens == 0
    assert same[0].num_cached_tokens > 0


@pytest.mark.parametrize("cut", [0, 1, 7, NUM_NEW - 1])
def test_resumed_sequence_continues_the_same_ids(glm, cut):
    """Given the ids that were already emitted, another engine goes on as if nothing had happened."""
    prompt = make_prompts(1)[0]
    whole = answer_ids(run_all(make_engine(glm), [seeded(prompt, 0, seed=9)])["0"])
    request = seeded(prompt, 0, seed=9)
    resumed = SequenceRequest("0", request.prompt_token_ids, request.sampling, emitted_token_ids=tuple(whole[:cut]))
    assert whole[:cut] + answer_ids(run_all(make_engine(glm), [resumed])["0"]) == whole


def test_ending_ids_end_the_sequence_and_are_counted(glm):
    """The id that ends an answer is its last id; `ignore_eos` spares those asked for; min_tokens holds it off."""
    prompt = make_prompts(1)[0]
    expected = reference_ids(glm, prompt)
    end = expected[5]
    cut = expected[: expected.index(end) + 1]

    def run(**sampling):
        return run_all(make_engine(glm), [greedy(prompt, **sampling)])["0"]

    for name in ("eos_token_ids", "stop_token_ids"):
        events = run(**{name: frozenset({end})})
        assert answer_ids(events) == cut
        assert events[-1].finish_reason is FinishReason.STOP
    assert answer_ids(run(eos_token_ids=frozenset({end}), ignore_eos=True)) == expected
    assert answer_ids(run(stop_token_ids=frozenset({end}), ignore_eos=True)) == cut
    held_off = answer_ids(run(eos_token_ids=frozenset({end}), min_tokens=10))
    assert end not in held_off[:10]
    assert len(held_off) > 10


def test_length_ends_at_max_tokens_and_at_the_context(glm):
    """`length` is said for both limits, and never one token more."""
    events = run_all(make_engine(glm), [greedy(range(3, 20), max_tokens=5)])["0"]
    assert len(answer_ids(events)) == 5
    assert events[-1].finish_reason is FinishReason.LENGTH
    events = run_all(make_engine(glm, max_context=24), [greedy(range(3, 23), max_tokens=100)])["0"]
    assert len(answer_ids(events)) == 4
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_logprobs_are_the_models_own(glm):
    """Prompt and answer log probabilities equal log_softmax of a plain forward pass, chunked or not."""
    prompt = make_prompts(1)[0] + tuple(range(3, 40))
    sampling = SamplingParams(max_tokens=3, temperature=0.0, top_logprobs=2, prompt_logprobs=2, presence_penalty=1.0)
    events = run_all(make_engine(glm, max_batch_tokens=10), [SequenceRequest("0", prompt, sampling)])["0"]
    ids = [*prompt, *answer_ids(events)]
    glm.set_attn_implementation("sdpa")
    expected = glm(torch.tensor([ids])).logits[0].log_softmax(-1)
    entries = [*events[0].prompt_logprobs, *(entry for event in events for entry in event.logprobs)]
    assert [entry.token_id for entry in entries] == ids
    assert entries[0].logprob is None
    for place, entry in enumerate(entries[1:]):
        assert entry.logprob == pytest.approx(float(expected[place, entry.token_id]), abs=1e-4)
        assert [token_id for token_id, _ in entry.top] == expected[place].topk(2).indices.tolist()


def test_prompt_only_request_generates_nothing(glm):
    """max_tokens 0 gives the prompt's log probabilities and no token."""
    sampling = SamplingParams(max_tokens=0, prompt_logprobs=0)
    (event,) = run_all(make_engine(glm), [SequenceRequest("0", (3, 4, 5), sampling)])["0"]
    assert event.token_ids == ()
    assert event.finish_reason is FinishReason.LENGTH
    assert [entry.token_id for entry in event.prompt_logprobs] == [3, 4, 5]


def test_embedding_is_the_mean_hidden_state_whatever_the_batch(glm):
    """The same vector alone, among answers, and in chunks."""
    prompts = make_prompts(5)
    glm.set_attn_implementation("sdpa")
    expected = [glm.get_decoder()(torch.tensor([prompt])).last_hidden_state[0].mean(0) for prompt in prompts]
    requests = [
        SequenceRequest(str(index), prompt, SamplingParams(max_tokens=0), wants_embedding=True)
        for index, prompt in enumerate(prompts)
    ]
    engine = make_engine(glm, max_batch_tokens=11, num_blocks=30, block_size=4, max_context=96)
    events = run_all(engine, [*requests, *(greedy(prompt, f"g{index}") for index, prompt in enumerate(prompts))])
    for index in range(len(prompts)):
        embedding = torch.tensor(events[str(index)][-1].embedding)
        torch.testing.assert_close(embedding, expected[index], atol=1e-5, rtol=1e-4)
        alone = run_all(make_engine(glm), [requests[index]])[str(index)][-1].embedding
        assert max_difference(embedding, torch.tensor(alone)) < 1e-6


def test_long_embeddings_are_those_of_one_piece(glm):
    """An input of many chunks has the vector that it has in one chunk, within 1e-6 of a unit vector."""
    prompt = tuple(3 + index * 7 % 500 for index in range(1500))
    request = SequenceRequest("0", prompt, SamplingParams(max_tokens=0), wants_embedding=True)
    engines = [make_engine(glm, max_context=2000, max_batch_tokens=size) for size in (2000, 100, 7)]
    whole, *chunked = [torch.tensor(run_all(engine, [request])["0"][-1].embedding) for engine in engines]
    assert all(max_difference(whole, vector) < 1e-6 for vector in chunked)


@pytest.mark.skipif(not native_attention.is_available(torch.float32), reason="there are no kernels here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_of_an_embedding_depends_on_where_its_input_is_cut(dtype):
    """The same text has the same vector, however busy the engine is."""
    model = make_model("qwen2", dtype)
    make_lean(model)
    prompts = [tuple(3 + (place * 7 + number) % 500 for place in range(MAX_ROWS - 1)) for number in range(5)]
    requests = [
        SequenceRequest(str(number), prompt, SamplingParams(max_tokens=0), wants_embedding=True)
        for number, prompt in enumerate(prompts)
    ]
    whole, *cut = [
        run_all(make_engine(model, max_batch_tokens=size), requests) for size in (MAX_ROWS - 1, 5, 7, 16, 30)
    ]
    assert all(events == whole for events in cut)


def max_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Between the two directions."""
    return float((one / one.norm() - other / other.norm()).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_is_repeatable(family, dtype):
    """In other dtypes: the same request alone gives the same ids, none lost, none doubled; greedy, drawn, embedded."""
    model = make_model(family, dtype)
    prompt = make_prompts(1)[0]
    embedding = SequenceRequest("e", prompt, SamplingParams(max_tokens=0), wants_embedding=True)
    penalties = {"repetition_penalty": 1.2, "frequency_penalty": 0.5, "top_logprobs": 2}
    requests = [greedy(prompt, **penalties), seeded(prompt, 1, seed=3), embedding]
    first, second = (
        [run_all(make_engine(model, max_batch_tokens=16), [request])[request.sequence_id] for request in requests]
        for _ in range(2)
    )
    assert first == second
    assert [len(answer_ids(events)) for events in first] == [NUM_NEW, NUM_NEW, 0]
    together = run_all(make_engine(model, max_batch_tokens=16), requests)
    assert [len(answer_ids(together[request.sequence_id])) for request in requests] == [NUM_NEW, NUM_NEW, 0]


def test_logits_that_are_not_numbers_end_only_their_sequence(glm):
    """One poisoned sequence gets an error; the others' ids do not change, and nothing of it is cached."""
    prompts = [prompt for prompt in make_prompts(6) if 400 not in prompt]
    expected = [reference_ids(glm, prompt) for prompt in prompts]
    model = make_model("glm")
    model.get_input_embeddings().weight[400] = torch.nan
    poisoned = greedy((*range(3, 20), 400), "bad")
    engine = make_engine(model)
    events = run_all(engine, [poisoned, *(greedy(prompt, index) for index, prompt in enumerate(prompts))])
    assert events["bad"][-1].finish_reason is FinishReason.ERROR
    assert [answer_ids(events[str(index)]) for index in range(len(prompts))] == expected
    again = run_all(engine, [greedy((*range(3, 20), 400), "bad")])["bad"]
    assert again[0].num_cached_tokens == 0


def test_nothing_of_a_prompt_that_fails_late_is_cached():
    """Its first part may have been wrong before anybody could see it; who shares it must not share that."""
    model = make_model("glm")
    model.get_input_embeddings().weight[400] = torch.nan
    engine = make_engine(model, max_batch_tokens=16)
    for _ in range(2):
        (event,) = run_all(engine, [greedy((400, *range(3, 50)), "bad")])["bad"]
        assert event.finish_reason is FinishReason.ERROR
        assert event.num_cached_tokens == 0
