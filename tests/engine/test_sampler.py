"""Laws of choosing the next token, against plain definitions."""

import gc
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampler import Sampler, largest_of_rows, random_unit
from fastchat.engine.sampling_params import SamplingParams
from fastchat.engine.sequence import Sequence
from fastchat.errors import InvalidRequestError

VOCAB_SIZE = 40


def make_sequence(prompt=(1, 2, 3), emitted=(), name="s", **sampling) -> Sequence:
    params = SamplingParams(**({"max_tokens": 100} | sampling))
    return Sequence(SequenceRequest(name, tuple(prompt), params, emitted_token_ids=tuple(emitted)), 0)


def choose(logits, **sampling) -> int:
    token_id = Sampler(logits.shape[0]).sample([make_sequence(**sampling)], logits.unsqueeze(0))[0].token_id
    assert token_id is not None
    return token_id


def random_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 3


def plain_distribution(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> list[float]:
    """The definition, written as slowly as possible."""
    weights = [math.exp((float(logit) - float(logits.max())) / temperature) for logit in logits]
    order = sorted(range(len(weights)), key=lambda token_id: -weights[token_id])
    kept = order[:top_k] if top_k else order
    total = sum(weights[token_id] for token_id in kept)
    mass, nucleus = 0.0, []
    for token_id in kept:
        if mass >= top_p * total and nucleus:
            break
        nucleus.append(token_id)
        mass += weights[token_id]
    nucleus = [token_id for token_id in nucleus if weights[token_id] >= min_p * weights[order[0]]]
    total = sum(weights[token_id] for token_id in nucleus)
    return [weights[token_id] / total if token_id in nucleus else 0.0 for token_id in range(len(weights))]


@settings(max_examples=200)
@given(
    logits_seed=st.integers(0, 10_000),
    seed=st.integers(-(2**63), 2**63 - 1),
    position=st.integers(0, 50),
    temperature=st.floats(0.1, 2.0),
    top_k=st.integers(0, VOCAB_SIZE),
    top_p=st.floats(0.05, 0.999),
    min_p=st.floats(0.0, 0.5),
)
def test_draw_is_the_inverse_cdf_of_the_plain_definition(logits_seed, seed, position, temperature, top_k, top_p, min_p):
    """The drawn id is where the running sum over the vocabulary passes the position's random number."""
    logits = random_logits(logits_seed)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    distribution = plain_distribution(logits, **options)
    # Where a cut-off falls on a sum of weights, float32 and float64 may cut on either side of a token.
    assume(all(plain_distribution(logits, **(options | {"top_p": top_p + by})) == distribution for by in (-1e-5, 1e-5)))
    drawn = choose(logits, seed=seed, emitted=[1] * position, **options)
    unit, below = random_unit(seed, 0, position), sum(distribution[:drawn])
    assert distribution[drawn] > 0
    assert below - 1e-5 <= unit <= below + distribution[drawn] + 1e-5


def test_rows_do_not_influence_each_other():
    """Thirty-two sequences with different options choose what each chooses alone."""
    options = [
        {"temperature": 0.0},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "min_p": 0.1, "presence_penalty": 1.5},
        {"temperature": 0.0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "logit_bias": ((3, 50.0),)},
        {"temperature": 0.9, "frequency_penalty": -1.0},
        {"temperature": 0.0, "min_tokens": 5, "eos_token_ids": frozenset({2})},
    ] * 4
    logits = torch.stack([random_logits(row) for row in range(32)])
    sequences = [make_sequence(name=str(row), seed=row, **chosen) for row, chosen in enumerate(options)]
    together = Sampler(VOCAB_SIZE).sample(sequences, logits)
    alone = [choose(logits[row], seed=row, **chosen) for row, chosen in enumerate(options)]
    assert [token.token_id for token in together] == alone


def test_penalties_follow_their_definitions():
    """Repetition over prompt and answer, presence once, frequency by count over the answer; logits stay unchanged."""
    logits = torch.zeros(VOCAB_SIZE)
    logits[[1, 5, 6]] = torch.tensor([4.0, 3.9, 3.8])
    before = logits.clone()
    assert choose(logits, temperature=0.0) == 1
    assert choose(logits, temperature=0.0, prompt=(1,), repetition_penalty=1.2) == 5
    assert choose(logits, temperature=0.0, prompt=(1,), presence_penalty=2.0) == 1
    for cut in ({}, {"top_p": 0.9}, {"temperature": 1e-5}):
        assert choose(logits, prompt=(1,), repetition_penalty=1e-300, **cut) == 1
    assert choose(logits, temperature=0.0, prompt=(9,), emitted=(1,), presence_penalty=0.15) == 5
    assert choose(logits, temperature=0.0, prompt=(9,), emitted=(1, 1, 5), frequency_penalty=0.2) == 6
    assert torch.equal(logits, before)


def test_penalties_count_tokens_as_they_come_and_are_forgotten():
    """Counting goes on from token to token and leaves nothing behind."""
    sampler = Sampler(VOCAB_SIZE)
    sequence = make_sequence(prompt=(9,), temperature=0.0, frequency_penalty=1.0)
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [1, 5]] = torch.tensor([4.0, 3.5])
    chosen = []
    for _ in range(4):
        chosen.append(sampler.sample([sequence], logits)[0].token_id)
        sequence.token_ids.append(chosen[-1])
    assert chosen == [1, 5, 1, 5]
    assert sampler.num_tracked == 1
    sampler.forget(sequence)
    assert sampler.num_tracked == 0


def test_penalties_cost_memory_by_a_sequences_tokens_and_not_by_the_vocabulary():
    """Twenty answers over a large vocabulary keep a few kilobytes, which no memory plan has to know."""
    vocab_size, sampler = 150_000, Sampler(150_000)
    sequences = [make_sequence(name=str(number), repetition_penalty=1.1) for number in range(20)]
    logits = torch.randn(len(sequences), vocab_size, generator=torch.Generator().manual_seed(1))
    before = bytes_of_tensors()
    for _ in range(50):
        for sequence, token in zip(sequences, sampler.sample(sequences, logits), strict=True):
            sequence.token_ids.append(token.token_id)
    assert bytes_of_tensors() - before < 20 * 4096


def bytes_of_tensors() -> int:
    gc.collect()
    return sum(each.nbytes for each in gc.get_objects() if type(each) is torch.Tensor)


def test_random_numbers_are_uniform_and_named_by_seed_choice_and_position():
    """Neighbouring seeds, choices and positions have unrelated numbers."""
    units = [random_unit(seed, choice, position) for seed in range(20) for choice in range(5) for position in range(50)]
    assert len(set(units)) == len(units)
    assert all(0.0 <= unit < 1.0 for unit in units)
    assert abs(sum(units) / len(units) - 0.5) < 0.02
    below = sum(unit < 0.1 for unit in units) / len(units)
    assert abs(below - 0.1) < 0.02


def test_large_vocabularies_are_cut_exactly():
    """top_p over a flat distribution keeps more than the candidates that are looked at first."""
    logits = torch.zeros(5000)
    logits[:3000] += torch.linspace(0, 0.01, 3000)
    drawn = {choose(logits, seed=seed, top_p=0.9) for seed in range(300)}
    assert all(token_id < 5000 for token_id in drawn)
    assert len(drawn) > 250


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("temperature", 2.1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("max_tokens", -1),
        ("min_tokens", 101),
        ("logit_bias", ((-1, 1.0),)),
        ("logit_bias", ((1, math.nan),)),
        ("top_logprobs", 21),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    """No option is clamped or ignored."""
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**({"max_tokens": 100} | {name: value}))
    assert caught.value.param == name


@pytest.mark.parametrize("size", [7, 255, 256, 257, 511, 512, 1000])
def test_the_largest_of_a_row_is_the_first_of_equals(size):
    """As `max` finds it, at every place and beside infinities; what is not a number is seen."""
    rows = torch.randint(-9, 9, (64, size), generator=torch.Generator().manual_seed(size)).float()
    rows.scatter_(1, torch.arange(64).unsqueeze(1) * size // 64, 9.0)
    rows[3, size // 2], rows[4] = torch.inf, -torch.inf
    expected = rows.max(dim=-1)
    found = largest_of_rows(rows)
    assert torch.equal(found[0], expected.values)
    assert torch.equal(found[1], expected.indices)
    rows[5, size - 1] = torch.nan
    assert largest_of_rows(rows)[0][5].isnan()
