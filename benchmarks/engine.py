"""How fast the engine is on this machine, without HTTP and without a checkpoint: random weights of a real shape.

    python benchmarks/engine.py                                    a 0.5B Qwen2 shape: 1, 8 and 32 streams
    python benchmarks/engine.py --shape chatglm2-6b --layers 4     four layers of ChatGLM2-6B's shape
    python benchmarks/engine.py --profile                          operator calls per decode step, and the slowest ones
    python benchmarks/engine.py --json /tmp/engine.json

Decode is measured apart from prefill: the time from the step that gave the last stream its first token to the end.
Numbers of a shared machine drift; compare only what was measured in one run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.engine.events import SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.models.lean import make_lean

SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "qwen2-0.5b": (
        "Qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
    ),
    "chatglm2-6b": (
        "Glm",
        {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_hidden_layers": 28,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": True,
            "vocab_size": 65024,
            "max_position_embeddings": 32768,
            "pad_token_id": 0,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of some streams."""

    streams: int
    prompt_tokens: int
    answer_tokens: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    first_token_s: float


def build_model(
    shape: str, num_layers: int | None, dtype: torch.dtype, device: str = "cpu"
) -> transformers.PreTrainedModel:
    """transformers' class with random weights, small enough that activations stay in range."""
    family, options = SHAPES[shape]
    if num_layers is not None:
        options = {**options, "num_hidden_layers": num_layers}
    config = getattr(transformers, f"{family}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(config)
    model = model.to(dtype).to_empty(device=device)
    model.tie_weights()  # to_empty gives a tied head memory of its own
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            else:
                parameter.uniform_(-((3 / parameter.shape[-1]) ** 0.5), (3 / parameter.shape[-1]) ** 0.5)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(requires_grad=False).eval()


def requests(num: int, prompt_tokens: int, answer_tokens: int, vocab_size: int) -> Iterator[SequenceRequest]:
    """Streams with different prompts, so that no prefix is shared."""
    generator = torch.Generator().manual_seed(num)
    for number in range(num):
        prompt = torch.randint(10, vocab_size - 10, (prompt_tokens,), generator=generator).tolist()
        sampling = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
        yield SequenceRequest(f"stream-{number}", tuple(prompt), sampling)


def measure(engine: Engine, num: int, prompt_tokens: int, answer_tokens: int) -> Measured:
    """Run `num` streams that begin together to their end."""
    waiting = set()
    for request in requests(num, prompt_tokens, answer_tokens, engine.limits.vocab_size):
        engine.add(request)
        waiting.add(request.sequence_id)
    began_at = time.perf_counter()
    first_token_s = prefilled_at = 0.0
    num_decoded = 0
    while engine.has_work:
        events = engine.step()
        now = time.perf_counter()
        if prefilled_at:
            num_decoded += sum(len(event.token_ids) for event in events)
        first_token_s = first_token_s or (now - began_at if events else 0.0)
        waiting -= {event.sequence_id for event in events}
        if not waiting and not prefilled_at:
            prefilled_at = now
    ended_at = time.perf_counter()
    return Measured(
        streams=num,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        prefill_tokens_per_s=num * prompt_tokens / (prefilled_at - began_at),
        decode_tokens_per_s=num_decoded / (ended_at - prefilled_at),
        first_token_s=first_token_s,
    )


class _CallCounter(TorchDispatchMode):
    """Counts operator calls and the time each took."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = {}

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        _types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # Any: torch's own hook
        began_at = time.perf_counter()
        outcome = function(*args, **(kwargs or {}))
        self.seconds.setdefault(str(function), []).append(time.perf_counter() - began_at)
        return outcome


@contextmanager
def counted_calls() -> Iterator[_CallCounter]:
    """Operator calls while the block lasts."""
    with _CallCounter() as counter:
        yield counter


def print_profile(engine: Engine, num: int) -> None:
    """Operator calls of one decode step of `num` streams."""
    for request in requests(num, 64, 8, engine.limits.vocab_size):
        engine.add(request)
    while engine.stats.num_queued_tokens > num or engine.stats.num_waiting:
        engine.step()
    with counted_calls() as counter:
        began_at = time.perf_counter()
        engine.step()
        took = time.perf_counter() - began_at
    while engine.has_work:
        engine.step()
    total = sum(len(times) for times in counter.seconds.values())
    print(f"{num} streams: {total} operator calls in a step of {took * 1000:.1f} ms (measured while counting)")
    slowest = sorted(counter.seconds.items(), key=lambda entry: -sum(entry[1]))
    for name, times in slowest[:14]:
        print(f"  {len(times):5} x {name:48} {sum(times) * 1000:8.2f} ms")


def median_of(runs: list[Measured]) -> Measured:
    """The run with the median decode speed."""
    middle = statistics.median_low([run.decode_tokens_per_s for run in runs])
    return next(run for run in runs if run.decode_tokens_per_s == middle)


def parse_arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2-0.5b", help="which model's shape")
    parser.add_argument("--layers", type=int, help="number of layers; default: the shape's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32], help="streams at once, default 1 8 32")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="tokens of each prompt, default 128")
    parser.add_argument("--answer-tokens", type=int, default=64, help="tokens of each answer, default 64")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each point, the median is shown; default 3")
    parser.add_argument("--plain", action="store_true", help="transformers' own layers instead of the lean ones")
    parser.add_argument("--profile", action="store_true", help="operator calls per decode step instead of speed")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    """Measure and print a table."""
    arguments = parse_arguments()
    model = build_model(arguments.shape, arguments.layers, getattr(torch, arguments.dtype))
    if not arguments.plain:
        make_lean(model)
    engine = Engine(
        model, EngineConfig(max_context=arguments.prompt_tokens + 4096, kv_cache_bytes=2**31, speculation=False)
    )
    if arguments.profile:
        for num in arguments.streams:
            print_profile(engine, num)
        return
    measure(engine, 1, 16, 4)
    print(f"{arguments.shape} {arguments.dtype}, {torch.get_num_threads()} threads, prompt {arguments.prompt_tokens}")
    print(f"{'streams':>8}{'prefill tok/s':>16}{'decode tok/s':>16}{'first token s':>16}")
    rows = []
    for num in arguments.streams:
        runs = [
            measure(engine, num, arguments.prompt_tokens, arguments.answer_tokens) for _ in range(arguments.repeats)
        ]
        row = median_of(runs)
        rows.append(row)
        print(f"{num:>8}{row.prefill_tokens_per_s:>16.1f}{row.decode_tokens_per_s:>16.1f}{row.first_token_s:>16.2f}")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
