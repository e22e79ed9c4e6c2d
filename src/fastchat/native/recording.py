"""A computation on a CPU recorded once and done again without its Python: a `GraphBackend` for the engine.

A decode step of a small model spends a tenth to a third of its time in Python, between a few hundred calls of kernels
whose arguments are the same in every step. While a step is computed for the first time, its calls are written down:
those of our kernels as numbers, which C++ calls again in one go, and what torch itself computes (the embedding, the
angles) as calls of its operators. As with CUDA graphs, a replay reads and writes the very tensors of the recording, and
gives its result in the same place every time.

The memory of results that are gone is used again, within a recording and by others, a step's own result included: one
step runs at a time, and its result is good until the next. What reads a number into Python (`item`) may go another way
with another number, and is never replayed: such a computation, or one with many of torch's operators, is simply
computed every time.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import weakref
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fastchat.native.build import Library, calls_go_to, kernels

logger = logging.getLogger(__name__)

NAMES = (
    "fastchat_multiply",
    "fastchat_multiply_int8",
    "fastchat_multiply_int4",
    "fastchat_attend",
    "fastchat_normalize",
    "fastchat_add",
    "fastchat_silu_and_multiply",
    "fastchat_rotate",
)
"""The kernels that can be recorded, in the order of FUNCTIONS in kernels.cpp."""
RECORD_SIZE = 32
"""The numbers of a recorded call: which kernel, then its arguments but for the last, the number of threads."""
MAX_OPERATORS = 64
"""Of torch's, in one recording: each costs what it costs without."""
MIN_BLOCK_BYTES = 4096

_aten = torch.ops.aten
_ALLOCATIONS = frozenset({_aten.empty, _aten.empty_like, _aten.new_empty})
_WAYS_TO_PYTHON = frozenset({_aten.resolve_conj, _aten.resolve_neg, _aten.lift_fresh})
"""What `tolist` and `numpy` call first, which then read the memory themselves; and what `torch.tensor` calls, whose
numbers may be others in the next step."""


class NotRecordableError(Exception):
    """A computation that must be computed every time; the message says why."""


class RecordedCalls:
    """The recordings of one engine, which share memory: a `GraphBackend`."""

    def __init__(self) -> None:
        self._pool = _Pool()

    def sizes(self, max_running: int) -> list[int]:
        """Every size: a row more costs time on a CPU, and a recording costs next to nothing."""
        return list(range(1, max_running + 1))

    def capture(self, compute: Callable[[], Tensor]) -> Recording | Computed:
        """Compute once, and record it; what cannot be recorded is computed by `compute` at every replay."""
        recorder = _Recorder(self._pool)
        try:
            with calls_go_to(_RecordedLibrary(kernels(), recorder)), recorder:
                output = compute()
        except NotRecordableError as reason:
            logger.debug("steps are not recorded reason=%s", reason)
            return Computed(compute)
        return Recording(recorder.steps(), self._pool.place_of(output), self._pool)


@dataclass(slots=True)
class Computed:
    """What stands for a graph where there is none."""

    compute: Callable[[], Tensor]

    def replay(self) -> Tensor:
        """Compute."""
        return self.compute()


@dataclass(slots=True)
class Recording:
    """A recorded computation; until the first replay its inputs are those of the recording, and nothing else runs."""

    steps: list[Callable[[], None]]
    output: Tensor
    memory: _Pool
    """Held, because the kernels' arguments are addresses in it."""
    _is_fresh: bool = True

    def replay(self) -> Tensor:
        """Compute again what was recorded; the first time it just was."""
        if not self._is_fresh:
            for step in self.steps:
                step()
        self._is_fresh = False
        return self.output


class _Pool:
    """Memory for results, given back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._blocks: dict[int, Any] = {}  # numpy's arrays by their address
        self._free: dict[int, list[Any]] = {}  # those that nobody has, by their size

    def like(self, wanted: Tensor) -> Tensor:
        """A tensor of the same shape and type, on memory of ours."""
        num_bytes = wanted.numel() * wanted.itemsize
        size = max(MIN_BLOCK_BYTES, 1 << (num_bytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        block = free.pop() if free else self._new_block(size)
        lent = block[:num_bytes]
        weakref.finalize(lent, free.append, block).atexit = False
        return torch.from_numpy(lent).view(wanted.dtype).view(wanted.shape)

    def place_of(self, tensor: Tensor) -> Tensor:
        """The tensor without its hold on our memory, which others may use when the tensor itself is gone."""
        block = self._blocks.get(_storage(tensor))
        if block is None:
            return tensor
        whole = torch.from_numpy(block).view(tensor.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _new_block(self, size: int) -> Any:
        memory = torch.empty(size, dtype=torch.uint8)
        block = self._blocks[memory.data_ptr()] = memory.numpy()
        return block


@dataclass(slots=True)
class _NativeCalls:
    """Calls of kernels without anything between them."""

    library: Library
    numbers: array[int] = field(default_factory=lambda: array("q"))

    def __call__(self) -> None:
        num_calls = len(self.numbers) // RECORD_SIZE
        self.library.fastchat_replay(self.numbers.buffer_info()[0], num_calls, torch.get_num_threads())


@dataclass(slots=True)
class _OperatorCall:
    """A call of one of torch's operators, whose results go where they went."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outcome: Any

    def __call__(self) -> None:
        again = self.function(*self.args, **self.kwargs)
        for old, new in zip(tree_leaves(self.outcome), tree_leaves(again), strict=True):
            if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Writes down the calls of torch's operators as a mode, and those of kernels as `_RecordedLibrary` tells them."""

    def __init__(self, pool: _Pool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._pool = pool
        self._steps: list[_NativeCalls | _OperatorCall] = []
        self._num_operators = 0

    def steps(self) -> list[Callable[[], None]]:
        """What to do at a replay, in order."""
        return [*self._steps]

    def add_native(self, library: Library, number: int, bits: list[int]) -> None:
        """A kernel was called."""
        last = self._steps[-1] if self._steps else None
        if not isinstance(last, _NativeCalls):
            last = _NativeCalls(library)
            self._steps.append(last)
        last.numbers.extend([number, *bits, *[0] * (RECORD_SIZE - 1 - len(bits))])

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # Any: torch's own hook
        kwargs = kwargs or {}
        outcome = function(*args, **kwargs)
        if function.overloadpacket in _ALLOCATIONS:
            if not outcome.is_contiguous():
                raise NotRecordableError("a result is not contiguous")  # nothing would hold its memory
            return self._pool.like(outcome)
        results = [result for result in tree_leaves(outcome) if isinstance(result, Tensor)]
        if not results or function.overloadpacket in _WAYS_TO_PYTHON:
            raise NotRecordableError(f"{function} gives Python a value, or takes one")
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        if function._schema.is_mutable or not given.issuperset(map(_storage, results)):  # noqa: SLF001 - no other way
            self._num_operators += 1
            if self._num_operators > MAX_OPERATORS:
                raise NotRecordableError(f"more than {MAX_OPERATORS} operators")
            outcome = tree_map_only(Tensor, lambda each: each if _storage(each) in given else self._move(each), outcome)
            places = tree_map_only(Tensor, self._pool.place_of, (args, kwargs, outcome))
            self._steps.append(_OperatorCall(function, *places))
        return outcome

    def _move(self, result: Tensor) -> Tensor:
        return self._pool.like(result).copy_(result)


class _RecordedLibrary:
    """Stands for the library, while calls are recorded."""

    def __init__(self, library: Library, recorder: _Recorder) -> None:
        self._library = library
        self._recorder = recorder

    def __getattr__(self, name: str) -> Callable[..., None]:
        """One of the library's functions, which is called and then written down."""
        if name not in NAMES:
            raise NotRecordableError(name)
        function = getattr(self._library, name)

        def run(*arguments: float | None) -> None:
            function(*arguments)
            bits = [_bits(kind, value) for kind, value in zip(function.argtypes, arguments, strict=True)]
            self._recorder.add_native(self._library, NAMES.index(name), bits[:-1])

        return run


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bits(kind: Any, value: float | None) -> int:
    """An argument as C++ finds it in a record."""
    if kind is ctypes.c_float:
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value or 0)
