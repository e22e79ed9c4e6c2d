"""Work on a matrix in blocks of rows that fit a processor's cache, on as many threads as torch uses.

torch's own threads meet after every operation; where others want the same cores, each meeting waits for the slowest,
and the hundreds of small operations of a block took fifty times as long. Here a thread has its block for itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

CPU_BLOCK_VALUES = 2**18
DEVICE_BLOCK_VALUES = 2**24


def for_row_blocks(source: Tensor, device: torch.device, work: Callable[[slice], None]) -> None:
    """Call `work` for every block of rows of (N, K), in any order; what it raises comes out here."""
    if device.type != "cpu":
        for rows in _blocks(source, DEVICE_BLOCK_VALUES):
            work(rows)
        return
    blocks = list(_blocks(source, CPU_BLOCK_VALUES))
    num_threads = min(torch.get_num_threads(), len(blocks))
    if num_threads <= 1:
        for rows in blocks:
            work(rows)
        return
    _run_on_threads(work, iter(blocks), num_threads)


def _run_on_threads(work: Callable[[slice], None], blocks: Iterator[slice], num_threads: int) -> None:
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while not errors and (rows := _next(blocks, lock)) is not None:
                work(rows)
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=run, name=f"rows-{number}", daemon=True) for number in range(num_threads)]
    num_torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of every thread that begins now
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_num_threads(num_torch_threads)
    if errors:
        raise errors[0]


def _next(blocks: Iterator[slice], lock: threading.Lock) -> slice | None:
    with lock:
        return next(blocks, None)


def _blocks(source: Tensor, num_values: int) -> Iterator[slice]:
    num_rows = max(1, num_values // max(1, source.shape[1]))
    return (slice(start, start + num_rows) for start in range(0, len(source), num_rows))
