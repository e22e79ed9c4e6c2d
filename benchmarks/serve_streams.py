"""Tokens per second of a running server at 1, 8 and 32 streams, medians of several rounds.

    python benchmarks/serve_streams.py --url http://localhost:8000 --model chatglm2-6b

Every stream asks for the same number of tokens with its own prompt and ignores the end of text, so that rows compare.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass

import aiohttp
import orjson


@dataclass(frozen=True)
class Round:
    """One round: all streams at once."""

    tokens_per_s: float
    first_token_s: float


async def read_stream(session: aiohttp.ClientSession, url: str, body: dict[str, object]) -> tuple[float, int]:
    """Seconds to the first token, and the number of tokens."""
    began = time.perf_counter()
    first_s = 0.0
    num_tokens = 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                choices = orjson.loads(line[6:])["choices"]
                num_new = len(choices[0].get("token_ids", ())) if choices else 0
                if num_new and not num_tokens:
                    first_s = time.perf_counter() - began
                num_tokens += num_new
    return first_s, num_tokens


async def run_round(flags: argparse.Namespace, num_streams: int, number: int) -> Round:
    """All streams of one round; prompts differ, so no prefix is shared."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        bodies = [
            {
                "model": flags.model,
                "prompt": [100 + (number * 7919 + stream * 104729 + place) % 400 for place in range(flags.prompt)],
                "max_tokens": flags.answer,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            for stream in range(num_streams)
        ]
        began = time.perf_counter()
        results = await asyncio.gather(*(read_stream(session, flags.url, body) for body in bodies))
        seconds = time.perf_counter() - began
    num_tokens = sum(count for _, count in results)
    assert num_tokens == num_streams * flags.answer, "tokens were lost"
    return Round(num_tokens / seconds, statistics.median(first for first, _ in results))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", default="chatglm2-6b")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--answer", type=int, default=64, help="answer tokens")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    print("streams  tokens/s (all)  tokens/s (each)  first token s")
    for num_streams in flags.streams:
        rounds = [asyncio.run(run_round(flags, num_streams, number)) for number in range(flags.rounds)]
        rate = statistics.median(done.tokens_per_s for done in rounds)
        first_s = statistics.median(done.first_token_s for done in rounds)
        print(f"{num_streams:7} {rate:15.1f} {rate / num_streams:16.1f} {first_s:14.3f}", flush=True)


if __name__ == "__main__":
    main()
