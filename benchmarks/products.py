"""Times of the matrix products of this machine: torch's and ours, for each weight form, shape and number of rows.

    python benchmarks/products.py
    python benchmarks/products.py --shapes 4096x13696 --rows 1 8 32 --repeats 15
    OMP_NUM_THREADS=1 python benchmarks/products.py --clock cpu       where other work disturbs the clock

Weights are taken in turn from copies of more than 300 MB in all, so that they come from memory as in a model; the forms
take turns too, and each figure is the median of its repeats. For few rows read GB/s (of the weight as held), for many
GFLOP/s. "torch" is F.linear as torch chooses, "plain" the same with oneDNN off (one row only), "prepacked" oneDNN's own
layout of the weight; "bfloat16", "int8" and "int4" (groups of 64) are `fastchat.native.products`.
"""

# ruff: noqa: SLF001 - torch has no public name for oneDNN's layout, nor a silent switch
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastchat.native import products
from fastchat.native.build import kernels

SHAPES = ("896x4864", "4864x896", "4096x13696", "4096x4608", "13696x4096", "896x151936")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
GROUP_SIZE = 64
WEIGHT_BYTES = 300 * 2**20
TURN_FLOP = 4e8
"""Calls per turn are as many as make this much work, at least one."""


@dataclass
class Form:
    """One way to hold a weight, and its product."""

    name: str
    bytes_per_weight: float
    weights: list[tuple[Tensor, ...]]
    multiply: Callable[..., Tensor]
    max_rows: int
    num_calls: int = 0
    seconds: list[float] = field(default_factory=list)

    def take_turn(self, rows: Tensor, num_calls: int, clock: Callable[[], float]) -> None:
        """Some calls, each with the next weight; keeps the time of one."""
        began = clock()
        for _ in range(num_calls):
            self.multiply(rows, *self.weights[self.num_calls % len(self.weights)])
            self.num_calls += 1
        self.seconds.append((clock() - began) / num_calls)


def linear_without_onednn(rows: Tensor, weight: Tensor) -> Tensor:
    """torch's own kernels."""
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return linear(rows, weight)
    finally:
        torch._C._set_mkldnn_enabled(before)


def linear_prepacked(rows: Tensor, weight: Tensor) -> Tensor:
    """oneDNN with its own layout of the weight."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")


def copies(tensors: tuple[Tensor, ...], total_bytes: int) -> list[tuple[Tensor, ...]]:
    """As many copies as take `total_bytes`, at least two."""
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(max(2, -(-total_bytes // num_bytes)))]


def make_forms(num_inputs: int, num_outputs: int, max_rows: int) -> Iterator[Form]:
    """One form after the other of a random weight."""
    weight = torch.empty(num_outputs, num_inputs, dtype=torch.bfloat16).uniform_(-0.1, 0.1)
    plain = copies((weight,), WEIGHT_BYTES)
    yield Form("torch", 2, plain, linear, max_rows)
    yield Form("plain", 2, plain, linear_without_onednn, 1)
    if torch.backends.mkldnn.is_available():
        prepacked = [(torch.ops.mkldnn._reorder_linear_weight(weight),) for _ in plain]
        yield Form("prepacked", 2, prepacked, linear_prepacked, max_rows)
    yield Form("bfloat16", 2, plain, products.multiply, max_rows)
    int8 = torch.randint(-127, 128, weight.shape, dtype=torch.int8), torch.rand(num_outputs)
    yield Form("int8", 1, copies(int8, WEIGHT_BYTES), products.multiply_int8, max_rows)
    packed = products.pack_int4(torch.randint(-8, 8, weight.shape, dtype=torch.int8))
    int4 = packed, torch.rand(num_outputs, packed.shape[1] * 2 // GROUP_SIZE)
    yield Form("int4", 0.5 + 4 / GROUP_SIZE, copies(int4, WEIGHT_BYTES), products.multiply_int4, max_rows)


def measure(form_list: list[Form], rows: Tensor, num_weights: int, flags: argparse.Namespace) -> None:
    """Print one line: every form's median."""
    flop = 2 * len(rows) * num_weights
    num_calls = max(1, int(TURN_FLOP / max(flop, 16 * num_weights)))
    taking_part = [form for form in form_list if len(rows) <= form.max_rows]
    for form in taking_part:
        form.seconds.clear()
    for _ in range(flags.repeats):
        for form in taking_part:
            form.take_turn(rows, num_calls, CLOCKS[flags.clock])
    cells = []
    for form in taking_part:
        seconds = statistics.median(form.seconds)
        speed = f"{form.bytes_per_weight * num_weights / seconds / 1e9:.1f} GB/s"
        if len(rows) > 8:
            speed = f"{flop / seconds / 1e9:.0f} GFLOP/s"
        cells.append(f"{form.name} {seconds * 1e6:.0f} us {speed}")
    print(f"{len(rows):5} rows  " + "   ".join(cells), flush=True)


def main() -> None:
    """Read the flags, measure shape by shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs (default: %(default)s)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="tokens per product (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each form (default: %(default)s)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what is read (default: %(default)s)")
    flags = parser.parse_args()
    is_native = "C++" if kernels() is not None else "torch: no compiler, or a CPU without AVX2"
    print(f"{torch.get_num_threads()} threads, kernels in {is_native}")
    torch.manual_seed(0)
    for shape in flags.shapes:
        num_inputs, num_outputs = map(int, shape.split("x"))
        print(f"{num_inputs} -> {num_outputs}")
        with torch.inference_mode():
            form_list = list(make_forms(num_inputs, num_outputs, max(flags.rows)))
            for num_rows in flags.rows:
                rows = torch.randn(num_rows, num_inputs).bfloat16()
                measure(form_list, rows, num_inputs * num_outputs, flags)


if __name__ == "__main__":
    main()
