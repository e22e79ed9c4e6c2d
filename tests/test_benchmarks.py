"""The figures of a comparison mean what the page says, and the page can be made from them."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks.goals import BF16, LLAMA_BF16, VLLM, outcomes
from benchmarks.peers.turn import Facts, random_prompts, summary, take_turn
from benchmarks.plots import Axis, Series, line_plot
from benchmarks.report import medians_of, page


def test_decode_begins_when_every_stream_has_its_first_token():
    """What one stream got before another one's first token is prefill's time, not decode's."""
    turn = summary([[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]], prompt_tokens=10)
    assert turn.prefill_tokens_per_s == 20 / 2
    assert turn.decode_tokens_per_s == (2 + 3) / 3
    assert turn.whole_tokens_per_s == 8 / 5
    assert (turn.first_token_p50_s, turn.between_tokens_p50_s) == (1.5, 1.0)


class OneTokenShort:
    """An engine that ends an answer too early."""

    facts = Facts("1", "", weight_bytes=0, read_bytes=0, cache_bytes=0, vocab_size=1000)

    def generate(self, prompts, answer_tokens):
        for _ in range(answer_tokens - 1):
            yield list(range(len(prompts)))


def test_answers_of_another_length_are_no_figure():
    """An engine that computes less than it was asked for is not faster."""
    with pytest.raises(RuntimeError, match=r"answers of \[3\] tokens instead of 4"):
        take_turn(OneTokenShort(), streams=2, prompt_tokens=5, answer_tokens=4, seed=1)


def test_prompts_are_the_same_for_every_engine_and_new_in_every_turn():
    """The same seed gives the same prompts; streams and turns share nothing."""
    assert random_prompts(2, 50, 1000, 1) == random_prompts(2, 50, 1000, 1)
    assert len({prompt[0] for seed in range(5) for prompt in random_prompts(1, 50, 100_000, seed)}) == 5


def turn(contestant, streams, rate):
    rates = dict.fromkeys(("prefill_tokens_per_s", "whole_tokens_per_s", "decode_tokens_per_s"), rate)
    seconds = dict.fromkeys(("first_token_p50_s", "between_tokens_p50_s"), 1.0)
    return {"contestant": contestant, "round": 0, "streams": streams, **rates, **seconds}


def test_a_goal_is_the_ratio_of_medians_against_the_best_of_the_others():
    """One bad round changes nothing; the best of the others counts."""
    turns = [turn(BF16, 8, rate) for rate in (125.0, 1.0, 125.0)]
    turns += [turn(LLAMA_BF16, 8, 90.0), turn(VLLM, 8, 100.0)]
    outcome = outcomes(medians_of(turns, "contestant"))[0]
    assert (outcome.best, outcome.ratio, outcome.is_met) == (VLLM, 1.25, True)
    slower = [*turns, *[turn(BF16, 8, 110.0)] * 4]
    assert not outcomes(medians_of(slower, "contestant"))[0].is_met


def test_the_page_names_what_was_not_run():
    """A comparison without the others still makes a page, which says so."""
    machine = dict.fromkeys(("read_gb_per_s", "bfloat16_gflop_per_s", "int8_gop_per_s", "memory_gb", "cores"), 1.0)
    machine |= {"instruction_sets": "AVX2", "torch": "2", "threads": 2}
    facts = {"version": "1", "settings": "", "weight_bytes": 10**9, "read_bytes": 10**9, "cache_bytes": 10**8}
    comparison = {
        "settings": {"prompt_tokens": 128, "answer_tokens": 128},
        "machine_before": machine,
        "machine_after": machine,
        "contestants": {BF16: {"facts": facts, "first_token_s": 5.0, "peak_bytes": 10**9}},
        "not_run": {VLLM: "not installed"},
        "turns": [turn(BF16, 8, 125.0)],
    }
    text = page(json.loads(json.dumps(comparison)), None)
    assert f"Not run: {VLLM}: not installed." in text
    assert f"| {BF16} | 125.0 |" in text


@pytest.mark.parametrize("base", [0, 2, 10])
def test_a_plot_is_whole_xml_with_every_value_inside(base):
    """Axes grow to hold what is drawn, linear or logarithmic; names are escaped."""
    places = [(1, 0.3), (7, 250.0), (64, 12.0)]
    drawn = ElementTree.fromstring(line_plot("a < b", Axis("x", base), Axis("y", base), [Series("s", places, 0)]))
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(places) + 2  # the legend's two
    assert all(40 <= float(circle.get("cy")) <= 380 and float(circle.get("cx")) >= 70 for circle in circles)
