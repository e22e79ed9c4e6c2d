"""How fast the engine is on a GPU, against what the GPU itself can do, measured in the same run.

    python benchmarks/gpu.py                                   ChatGLM2-6B's shape: bfloat16, int8 and int4
    python benchmarks/gpu.py --forms bfloat16 --json gpu.json
    python benchmarks/gpu.py --shape qwen2-0.5b --streams 64

Needs Python, torch and transformers (5.17 is enough), and none of the packages that serve HTTP. Weights are random.

    decode, one stream    bytes that a token must read (weights but the input embedding, keys and values of its context)
                          times tokens/s, as a share of the rate at which the GPU copies memory (read and written)
    many streams          tokens/s of the whole run, prompts included; beside it transformers' continuous batching with
                          the same weights, prompts and answers, bfloat16 alone
    prefill               two operations per weight and token, as a share of the rate of a large bfloat16 product
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from engine import SHAPES, build_model, measure, requests
from torch import nn

from fastchat.engine.engine import Engine, EngineConfig
from fastchat.engine.model_runner import KVShape
from fastchat.models.lean import make_lean
from fastchat.models.quantized_parts import QuantizedParts
from fastchat.models.stored_form import Quantization, form_of

FORMS = ("bfloat16", "int8", "int4")
COPY_BYTES = 2**32
SIDE = 8192
REPEATS = 7
ANSWER_TOKENS = 128
PREFILL_STREAMS, PREFILL_TOKENS = 4, 2048
MAX_CONTEXT = 4096

Figures = dict[str, float | int | str]


def main() -> None:
    """Measure, print one line per figure, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="chatglm2-6b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens of a step at most")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    flags = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU on this machine: nothing was measured")
    device = torch.device("cuda")
    figures: list[Figures] = [measure_device(device)]
    report(figures[0])
    for form in flags.forms:
        for found in measure_form(form, flags, device, figures[0]):
            figures.append(found)
            report(found)
    if flags.json:
        flags.json.write_text(json.dumps(figures, indent=2))


def report(figures: Figures) -> None:
    """One line."""
    print(
        "  ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
    )


def measure_device(device: torch.device, *, copy_bytes: int = COPY_BYTES, side: int = SIDE) -> Figures:
    """The two rates that everything is compared with."""
    source = torch.ones(copy_bytes // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    square = torch.randn(side, side, device=device).to(torch.bfloat16)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "copy_gb_per_s": 2 * copy_bytes / 1e9 / seconds_of(lambda: target.copy_(source), device),
        "matrix_tflop_per_s": 2 * side**3 / 1e12 / seconds_of(lambda: square @ square, device),
    }


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """The median of some calls, after one that warms up."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_form(form: str, flags: argparse.Namespace, device: torch.device, limits: Figures) -> list[Figures]:
    """All figures of the weights held in one form."""
    model = build_model(flags.shape, flags.layers, torch.bfloat16, str(device))
    figures = []
    if form == "bfloat16":
        figures.append(measure_transformers(model, flags))
    else:
        quantize(model, form)
    make_lean(model)
    num_places = flags.streams * (flags.prompt + ANSWER_TOKENS + 64) + PREFILL_STREAMS * (PREFILL_TOKENS + 64)
    config = EngineConfig(
        max_context=MAX_CONTEXT,
        kv_cache_bytes=num_places * KVShape.of(model).bytes_per_token,
        max_batch_tokens=flags.batch_tokens,
        max_running=flags.streams,
        prefix_caching=False,
        speculation=False,
    )
    engine = Engine(model, config)
    figures += [
        measure_one_stream(engine, model, form, flags, limits),
        measure_prefill(engine, model, form, limits),
        measure_streams(engine, form, flags),
    ]
    del engine, model
    gc.collect()
    torch.cuda.empty_cache()
    return figures


def quantize(model: transformers.PreTrainedModel, name: str) -> None:
    """Hold the Linears' weights as a load with that precision would."""
    parts = QuantizedParts(model, model.device)
    for target, parameter in list(model.named_parameters()):
        form = form_of(target, parameter.shape, "bfloat16", Quantization(name))
        if form.name in {"int8", "int4"}:
            parts.quantize(target, parameter.data, form)


def measure_one_stream(
    engine: Engine, model: nn.Module, form: str, flags: argparse.Namespace, limits: Figures
) -> Figures:
    """The second run is the measured one: the first compiles kernels and captures the graph."""
    runs = [measure(engine, 1, flags.prompt, ANSWER_TOKENS) for _ in range(4)]
    tokens_per_s = statistics.median(run.decode_tokens_per_s for run in runs[1:])
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    is_tied = getattr(head, "weight", None) is embedding
    weights = sum(parameter.nbytes for parameter in model.parameters()) - (0 if is_tied else embedding.nbytes)
    context = (flags.prompt + ANSWER_TOKENS / 2) * KVShape.of(model).bytes_per_token
    rate = tokens_per_s * (weights + context) / 1e9
    return {
        "figure": "decode, one stream",
        "form": form,
        "tokens_per_s": tokens_per_s,
        "bytes_per_token": int(weights + context),
        "share_of_copy_rate": rate / float(limits["copy_gb_per_s"]),
    }


def measure_prefill(engine: Engine, model: nn.Module, form: str, limits: Figures) -> Figures:
    """Prompts without answers to speak of; the head computes one row of each and is not counted."""
    runs = [measure(engine, PREFILL_STREAMS, PREFILL_TOKENS, 2) for _ in range(3)]
    tokens_per_s = statistics.median(run.prefill_tokens_per_s for run in runs[1:])
    # A layer's weights, whatever they are held in: what its Linears say of their sizes.
    linears = [part for part in model.get_decoder().modules() if hasattr(part, "in_features")]
    operations = 2 * sum(part.in_features * part.out_features for part in linears)
    return {
        "figure": f"prefill, {PREFILL_STREAMS} x {PREFILL_TOKENS}",
        "form": form,
        "tokens_per_s": tokens_per_s,
        "share_of_matrix_rate": tokens_per_s * operations / 1e12 / float(limits["matrix_tflop_per_s"]),
    }


def measure_streams(engine: Engine, form: str, flags: argparse.Namespace) -> Figures:
    """Whole runs, prompts included, as transformers' are measured."""

    def run() -> None:
        measure(engine, flags.streams, flags.prompt, ANSWER_TOKENS)

    return _streams("ours", form, flags, run)


def measure_transformers(model: transformers.PreTrainedModel, flags: argparse.Namespace) -> Figures:
    """Its continuous batching with its own defaults for a GPU, which choose graphs and kernels."""
    model.set_attn_implementation("sdpa")
    prompts = [
        list(request.prompt_token_ids)
        for request in requests(flags.streams, flags.prompt, ANSWER_TOKENS, model.config.vocab_size)
    ]
    config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=ANSWER_TOKENS
    )

    def run() -> None:
        answers = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
        num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
        if num_tokens != flags.streams * ANSWER_TOKENS:
            raise RuntimeError(f"{num_tokens} tokens came")

    try:
        return _streams("transformers", "bfloat16", flags, run)
    except Exception as error:  # noqa: BLE001 - a peer that fails is named, and ours is measured all the same
        return {"figure": "many streams", "engine": "transformers", "not run": f"{type(error).__name__}: {error}"}


def _streams(name: str, form: str, flags: argparse.Namespace, run: Callable[[], None]) -> Figures:
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {
        "figure": "many streams",
        "engine": name,
        "form": form,
        "streams": flags.streams,
        "prompt_tokens": flags.prompt,
        "answer_tokens": ANSWER_TOKENS,
        "tokens_per_s": flags.streams * ANSWER_TOKENS / statistics.median(seconds[1:]),
    }


if __name__ == "__main__":
    main()
