"""Looking ahead changes when tokens come, and nothing else."""

import pytest
import torch

from fastchat.engine.drafting import DraftSource
from fastchat.engine.events import FinishReason, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.sequence import Sequence
from fastchat.models.lean import make_lean
from fastchat.native import attention as native_attention
from tests.engine.conftest import answer_ids, make_engine, run_all
from tests.engine.tiny_models import VOCAB_SIZE, make_model

REPEATING = (5, 6, 7, 8, 9, 10, 11) * 5
NUM_NEW = 60


def request(name="a", prompt=REPEATING, max_tokens=NUM_NEW, **sampling) -> SequenceRequest:
    return SequenceRequest(name, prompt, SamplingParams(max_tokens=max_tokens, **sampling))


def both(model, requests, **config):
    """The same requests without and with drafts, and the engine that had them."""
    plain = run_all(make_engine(model, speculation=False, **config), requests)
    engine = make_engine(model, **config)
    return plain, run_all(engine, requests), engine


@pytest.fixture(scope="module")
def copying():
    """A model that mostly goes round in circles of ten tokens, so that its text repeats itself, drawn too."""
    model = make_model("glm")
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.3)
    token_ids = torch.arange(VOCAB_SIZE)
    followers = torch.where(token_ids % 10 == 9, token_ids - 9, token_ids + 1).clamp(max=VOCAB_SIZE - 1)
    model.lm_head.weight[followers] = 0.15 * model.get_input_embeddings().weight[token_ids]
    return model


OPTIONS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.7, "seed": 3},
    "cut off": {"temperature": 1.0, "top_p": 0.5, "top_k": 5, "seed": 4},
    "penalties": {"temperature": 0.0, "repetition_penalty": 1.02, "frequency_penalty": 0.05},
    "logprobs": {"temperature": 0.0, "top_logprobs": 2, "prompt_logprobs": 1},
    "biased": {"temperature": 0.0, "logit_bias": ((7, 2.0),)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_drafts_change_no_token(copying, options):
    """Greedy, drawn, penalised, with log probabilities: the same ids, and what belongs to them."""
    plain, drafted, engine = both(copying, [request(**options)])
    assert answer_ids(drafted["a"]) == answer_ids(plain["a"])
    ids = [entry.token_id for event in drafted["a"] for entry in event.logprobs]
    assert ids == ([] if "top_logprobs" not in options else answer_ids(plain["a"]))
    assert engine.stats.num_drafted_tokens > 0
    assert engine.stats.num_generated_tokens == NUM_NEW


def test_repeating_text_takes_fewer_steps(copying):
    """What is accepted is a step saved."""
    plain, drafted, engine = both(copying, [request(temperature=0.0)])
    assert len(drafted["a"]) < 0.6 * len(plain["a"])
    assert engine.stats.num_accepted_tokens == NUM_NEW - len(drafted["a"])


def test_text_that_does_not_repeat_is_hardly_drafted(glm):
    """A sequence whose drafts fail pauses: few tokens are computed in vain."""
    _, _, engine = both(glm, [request(temperature=2.0, seed=1, max_tokens=200)], max_context=300)
    assert engine.stats.num_drafted_tokens <= 40


@pytest.mark.parametrize("name", ["eos_token_ids", "stop_token_ids"])
def test_an_ending_id_within_a_draft_ends_the_sequence(copying, name):
    """Nothing behind the ending id comes out, and `min_tokens` holds within a draft too."""
    whole = answer_ids(run_all(make_engine(copying, speculation=False), [request(temperature=0.0)])["a"])
    for end in sorted(set(whole[20:]))[:4]:
        for min_tokens in (0, 25):
            options = {"temperature": 0.0, "min_tokens": min_tokens, name: frozenset({end})}
            plain, drafted, _ = both(copying, [request(**options)])
            assert answer_ids(drafted["a"]) == answer_ids(plain["a"])
            assert drafted["a"][-1].finish_reason is plain["a"][-1].finish_reason


def test_answers_end_at_their_limits(copying):
    """No draft goes beyond max_tokens or the context."""
    for max_tokens in range(1, 9):
        events = run_all(make_engine(copying), [request(temperature=0.0, max_tokens=max_tokens)])["a"]
        assert len(answer_ids(events)) == max_tokens
    events = run_all(make_engine(copying, max_context=40), [request(temperature=0.0)])["a"]
    assert len(answer_ids(events)) == 40 - len(REPEATING)
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_mates_late_arrivals_and_preemption_change_nothing(copying):
    """Sequences of all kinds share steps in a cache too small for them; each has the text that it has alone."""
    requests = [
        request(f"{index}", (*REPEATING[index:], 20 + index), **options)
        for index, options in enumerate([*OPTIONS.values()][:4])
    ]
    alone = {
        each.sequence_id: run_all(make_engine(copying, speculation=False), [each])[each.sequence_id]
        for each in requests
    }
    engine = make_engine(copying, num_blocks=30, block_size=8, max_context=128)
    together = run_all(engine, requests)
    assert {name: answer_ids(events) for name, events in together.items()} == {
        name: answer_ids(events) for name, events in alone.items()
    }
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_accepted_tokens > 0


def test_rejected_tokens_never_reach_the_prefix_cache(copying):
    """A conversation that goes on after a drafted answer finds its blocks, and answers as without any cache."""
    engine = make_engine(copying, block_size=4)
    for seed in range(5):
        first = answer_ids(run_all(engine, [request(temperature=0.9, seed=seed)])["a"])
    assert 0 < engine.stats.num_accepted_tokens < engine.stats.num_drafted_tokens
    longer = (*REPEATING, *first, 30, 31)
    again = run_all(engine, [request("b", longer, temperature=0.0)])["b"]
    fresh = run_all(make_engine(copying, speculation=False), [request("b", longer, temperature=0.0)])["b"]
    assert again[0].num_cached_tokens == (len(longer) - 3) // 4 * 4
    assert answer_ids(again) == answer_ids(fresh)


@pytest.mark.skipif(not native_attention.is_available(torch.bfloat16), reason="no compiler: rows depend on the batch")
def test_with_the_kernels_drafts_change_no_bit_of_bfloat16():
    """A drafted place has the bits of a next token, so in half precision too the text is the same."""
    model = make_model("qwen2", torch.bfloat16)
    make_lean(model)
    requests = [request("a", temperature=0.0, top_logprobs=0), request("b", temperature=0.9, seed=2, top_logprobs=0)]
    plain, drafted, engine = both(model, requests)
    assert engine.stats.num_drafted_tokens > 0
    for name in plain:
        assert [entry for event in drafted[name] for entry in event.logprobs] == [
            entry for event in plain[name] for entry in event.logprobs
        ]


def test_a_draft_is_what_followed_the_last_time():
    """The latest repetition counts; beyond the last token the draft repeats itself; failures make it pause."""
    sequence = Sequence(request(prompt=(1, 2, 3, 9, 9, 1, 2, 3, 4, 5, 1, 2, 3)), 0)
    source = DraftSource(sequence)
    assert source.draft(4) == (4, 5, 1, 2)
    assert source.draft(7) == (4, 5, 1, 2, 3, 4, 5)
    source.note(0)
    assert source.draft(4) == ()
    sequence.token_ids += [4]
    assert source.draft(2) == (5, 1)
    sequence.token_ids += [77]
    assert source.draft(4) == ()
