"""The relay's benchmark measures what it says: whole answers with all their tokens, through our own processes."""

import asyncio
from argparse import Namespace

from benchmarks import relay

SMALL = Namespace(rounds=1, many=8, whole=2, streams=1, first_tokens=2, long=64, many_tokens=5)


def test_the_benchmark_runs_and_loses_no_token(tmp_path):
    """Every answer is counted token by token; an error or a missing token would raise."""
    with relay.our_system(tmp_path / "ours") as system:
        figures = asyncio.run(relay.measure([system], SMALL))[relay.OURS]
    summary = figures.summary()
    assert summary["whole_answers_per_s"] > 0
    assert summary["streamed_tokens_per_s"] > 0
    assert set(summary["cpu_us_per_streamed_token"]) == {64}
    assert summary["many_streams"]["streams"] == 8
