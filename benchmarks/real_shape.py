"""One model of real size on this machine: reading, loading, memory, first answer, speed.

    python benchmarks/make_checkpoint.py /tmp/chatglm2-6b
    python benchmarks/real_shape.py /tmp/chatglm2-6b
    python benchmarks/real_shape.py /tmp/chatglm2-6b --cold           drops the page cache first (needs root)
    python benchmarks/real_shape.py /tmp/chatglm2-6b --quantize int8

Memory is the peak of the process's anonymous pages (`RssAnon`), sampled; the files' own pages belong to the system.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402 - the line above makes `benchmarks` known

from benchmarks.machine import read_rate  # noqa: E402
from fastchat.engine.engine import Engine  # noqa: E402
from fastchat.engine.engine_config import EngineConfig  # noqa: E402
from fastchat.engine.events import SequenceRequest  # noqa: E402
from fastchat.engine.sampling_params import SamplingParams  # noqa: E402
from fastchat.models.checkpoint import Checkpoint  # noqa: E402
from fastchat.models.lean import make_lean  # noqa: E402
from fastchat.models.stored_form import Quantization  # noqa: E402
from fastchat.models.weights import load_model  # noqa: E402

GB = 1e9


def anonymous_bytes() -> int:
    """This process's anonymous memory now."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Samples anonymous memory; the list's one item is the peak in bytes."""
    peak = [anonymous_bytes()]
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            peak[0] = max(peak[0], anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        ended.set()
        sampler.join()


def read_files(folder: Path) -> tuple[int, float]:
    """Bytes of the weight files and the seconds it takes to read them, one after the other."""
    num_bytes = 0
    buffer = bytearray(16 * 2**20)
    began = time.perf_counter()
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.safetensors")]):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes, time.perf_counter() - began


def drop_page_cache() -> None:
    """So that files are read from the disk again."""
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(engine: Engine, requests: list[SequenceRequest]) -> tuple[float, float, int]:
    """Seconds until every request has its first token, seconds after that, tokens after that."""
    for request in requests:
        engine.add(request)
    began = time.perf_counter()
    waiting = {request.sequence_id for request in requests}
    first_s, num_later = 0.0, 0
    while engine.has_work:
        events = engine.step()
        if waiting:
            waiting -= {event.sequence_id for event in events}
            first_s = time.perf_counter() - began
        else:
            num_later += sum(len(event.token_ids) for event in events)
    return first_s, time.perf_counter() - began - first_s, num_later


def request(name: str, num_prompt: int, num_answer: int, *, embeds: bool = False) -> SequenceRequest:
    """A prompt that shares nothing with others, a greedy answer of exactly so many tokens."""
    generator = torch.Generator().manual_seed(hash_of(name))
    prompt = torch.randint(300, 30000, (num_prompt,), generator=generator).tolist()
    sampling = SamplingParams(max_tokens=num_answer, temperature=0.0, ignore_eos=True)
    return SequenceRequest(name, tuple(prompt), sampling, wants_embedding=embeds)


def hash_of(name: str) -> int:
    """The same number for a name in every run."""
    return int.from_bytes(name.encode()[:6], "big")


def parse_arguments() -> argparse.Namespace:
    """Flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--quantize", choices=["int8", "int4"], help="quantize while loading (default: no)")
    parser.add_argument("--cold", action="store_true", help="drop the page cache before reading and before loading")
    parser.add_argument("--long", type=int, default=8000, help="tokens of the long prompt; 0 leaves it out")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def main() -> None:
    """Measure one thing after the other and print a line for each."""
    flags = parse_arguments()
    if flags.cold:
        drop_page_cache()
    num_bytes, seconds = read_files(flags.folder)
    figures: dict[str, object] = {
        "weights": flags.quantize or flags.dtype,
        "is_cold": flags.cold,
        "file_bytes": num_bytes,
        "reading_s": seconds,
    }
    print(
        f"reading          {num_bytes / GB:.2f} GB in {seconds:.1f} s, {num_bytes / GB / seconds:.2f} GB/s", flush=True
    )
    if flags.cold:
        drop_page_cache()

    before = anonymous_bytes()
    with peak_memory() as peak:
        began = time.perf_counter()
        quantization = Quantization(flags.quantize) if flags.quantize else None
        model = load_model(Checkpoint.open(flags.folder), dtype=flags.dtype, quantization=quantization)
        make_lean(model)
        seconds = time.perf_counter() - began
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    embedding = model.get_input_embeddings().weight  # looked up, never read as a whole
    figures |= {"loading_s": seconds, "held_bytes": held, "read_bytes": held - embedding.nbytes}
    figures |= {"loading_peak_bytes": peak[0], "machine_read_gb_per_s": read_rate()}
    print(f"loading          {seconds:.1f} s, {num_bytes / GB / seconds:.2f} GB/s, as {flags.quantize or model.dtype}")
    print(
        f"memory           weights {held / GB:.2f} GB, peak {peak[0] / GB:.2f} GB, before loading {before / GB:.2f} GB"
    )

    engine = Engine(model, EngineConfig(max_context=9000, kv_cache_bytes=2**30, speculation=False))
    with peak_memory() as peak:
        run(engine, [request("warm", 8, 2)])
        first_s, later_s, num_later = run(engine, [request("one", 128, 32)])
        print(
            f"one stream       first token of 128 after {first_s:.2f} s, then {num_later / later_s:.2f} tokens/s",
            flush=True,
        )
        rate = num_later / later_s
        figures |= {"one_first_token_s": first_s, "one_tokens_per_s": rate}
        print(f"                 {rate * held / GB:.1f} GB/s of weights read")
        first_s, later_s, num_later = run(engine, [request(f"eight-{i}", 128, 32) for i in range(8)])
        print(
            f"eight streams    first tokens of 8 x 128 after {first_s:.2f} s, then {num_later / later_s:.2f} tokens/s",
            flush=True,
        )
        figures |= {"eight_first_token_s": first_s, "eight_tokens_per_s": num_later / later_s}
        first_s, _, _ = run(engine, [request("vector", 128, 0, embeds=True)])
        print(f"embedding        of 128 tokens in {first_s:.2f} s", flush=True)
        figures |= {"embedding_s": first_s}
        if flags.long:
            first_s, later_s, num_later = run(engine, [request("long", flags.long, 8)])
            print(f"long prompt      {flags.long} tokens in {first_s:.1f} s, {flags.long / first_s:.1f} tokens/s,")
            print(f"                 then {num_later / later_s:.2f} tokens/s at that context")
            figures |= {
                "long_tokens": flags.long,
                "long_first_token_s": first_s,
                "long_tokens_per_s": num_later / later_s,
            }
    print(f"memory           peak while computing {peak[0] / GB:.2f} GB")
    if flags.json:
        flags.json.parent.mkdir(parents=True, exist_ok=True)
        flags.json.write_text(json.dumps({**figures, "peak_bytes": peak[0]}, indent=1))


if __name__ == "__main__":
    main()
