"""Two situations of a busy worker, beside the quiet ones they are to be compared with; the engines run on threads.

    python benchmarks/busy.py FOLDER --weights int8

Two models: the same streams on one engine alone, then on two engines of one process at once. Aborts: a number of
streams kept in flight, with every fifth request given up at a token drawn by chance, and with none. The cases take
turns, and medians are compared. Prints JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from contextlib import AsyncExitStack
from functools import partial
from itertools import count
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402 - the line above makes `benchmarks` known

from benchmarks.peers.turn import random_prompts  # noqa: E402
from fastchat.engine.client import EngineClient  # noqa: E402
from fastchat.engine.engine import Engine  # noqa: E402
from fastchat.engine.engine_config import EngineConfig  # noqa: E402
from fastchat.engine.events import SequenceRequest  # noqa: E402
from fastchat.engine.sampling_params import SamplingParams  # noqa: E402
from fastchat.engine.thread_client import ThreadEngineClient  # noqa: E402
from fastchat.engine.turns import Turns  # noqa: E402
from fastchat.models.checkpoint import Checkpoint  # noqa: E402
from fastchat.models.lean import make_lean  # noqa: E402
from fastchat.models.stored_form import Quantization  # noqa: E402
from fastchat.models.weights import load_model  # noqa: E402

STREAMS = 8
PROMPT_TOKENS = 64
ABORT_EVERY = 5
CONTEXT = 512

_seeds = count(1)


def make_engine(folder: Path, weights: str) -> Engine:
    """As a worker makes it."""
    quantization = None if weights == "bfloat16" else Quantization(weights)
    model = load_model(Checkpoint.open(folder), dtype="bfloat16", quantization=quantization)
    make_lean(model)
    return Engine(model, EngineConfig(max_context=CONTEXT, kv_cache_bytes=2**28, speculation=False))


async def answer(client: EngineClient, prompt: list[int], answer_tokens: int, give_up_after: int | None = None) -> int:
    """Read one answer, or its beginning; the number of tokens that were read."""
    sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
    request = SequenceRequest(f"{next(_seeds)}", tuple(prompt), sampling)
    num_read = 0
    async with client.open(request) as stream:
        while num_read < (answer_tokens if give_up_after is None else give_up_after):
            num_read += sum(len(event.token_ids) for event in await stream.next_events())
    return num_read


async def together(clients: list[EngineClient], answer_tokens: int) -> float:
    """Tokens per second of all clients, each with the same streams."""
    prompts = random_prompts(STREAMS * len(clients), PROMPT_TOKENS, clients[0].limits.vocab_size, next(_seeds))
    began = time.perf_counter()
    counts = await asyncio.gather(
        *(answer(clients[number % len(clients)], prompt, answer_tokens) for number, prompt in enumerate(prompts))
    )
    return sum(counts) / (time.perf_counter() - began)


async def with_aborts(client: EngineClient, num_requests: int, answer_tokens: int, *, has_aborts: bool) -> float:
    """Tokens read per second while `STREAMS` requests are in flight, the last ones apart."""
    seed = next(_seeds)
    draw = random.Random(seed)
    prompts = random_prompts(num_requests, PROMPT_TOKENS, client.limits.vocab_size, seed)
    waiting = iter(enumerate(prompts))

    async def read_many() -> int:
        num_read = 0
        for number, prompt in waiting:
            is_given_up = has_aborts and number % ABORT_EVERY == 0
            num_read += await answer(
                client, prompt, answer_tokens, draw.randrange(1, answer_tokens) if is_given_up else None
            )
        return num_read

    began = time.perf_counter()
    counts = await asyncio.gather(*(read_many() for _ in range(STREAMS)))
    return sum(counts) / (time.perf_counter() - began)


async def free_blocks(client: EngineClient) -> tuple[int, int]:
    """Free blocks and all blocks after one more answer, before whose end every abort has been obeyed."""
    await answer(client, [1] * PROMPT_TOKENS, 2)
    return client.stats.num_free_blocks, client.stats.num_blocks


async def measure(flags: argparse.Namespace) -> dict[str, object]:
    """All cases in turns."""
    turns = Turns()  # as the models of one worker share them
    make = partial(make_engine, flags.folder, flags.weights)
    clients: list[EngineClient] = [ThreadEngineClient(make, name=name, turns=turns) for name in ("one", "two")]
    async with AsyncExitStack() as closing:
        for client in clients:
            closing.push_async_callback(client.close)
            await client.start()
            await together([client], 4)
        cases: dict[str, list[float]] = {"alone": [], "both": [], "no_aborts": [], "aborts": []}
        for _ in range(flags.repeats):
            cases["alone"].append(await together(clients[:1], flags.answer_tokens))
            cases["both"].append(await together(clients, flags.answer_tokens))
            for name in ("no_aborts", "aborts"):
                is_aborting = name == "aborts"
                rate = await with_aborts(clients[0], flags.requests, flags.answer_tokens, has_aborts=is_aborting)
                cases[name].append(rate)
        free, total = await free_blocks(clients[0])
    medians = {name: statistics.median(rates) for name, rates in cases.items()}
    return {
        "weights": flags.weights,
        "streams": STREAMS,
        "tokens_per_s": medians,
        "two_models_ratio": medians["both"] / medians["alone"],
        "aborts_ratio": medians["aborts"] / medians["no_aborts"],
        "free_blocks_after": free,
        "blocks": total,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", choices=("bfloat16", "int8", "int4"), default="bfloat16")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--requests", type=int, default=40, help="of the cases with and without aborts, default 40")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    print(json.dumps(asyncio.run(measure(flags))))


if __name__ == "__main__":
    main()
