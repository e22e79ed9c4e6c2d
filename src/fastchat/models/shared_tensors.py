"""Tensors that are bit-identical in two models of this process are held once.

Fine-tunes often leave embeddings, norms or whole layers as they were. What is loaded is looked up by its content among
what is held already: by a sample of its bytes first, then by all of them, so no chance decides. Where it is there, the
new model gets a view of the same memory and the copy just read is dropped; so a shared model never needs the memory of
a second one, not even while it is loaded. Weights are never written to after loading, and memory is freed when the last
model that sees it lets go.

`join_rows` (`lean.py`) moves rows into larger tensors. It says so here (`moved`), and where all parts are views that
lie side by side already, it joins them without a copy (`side_by_side`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SAMPLE_BYTES = 512

_Key = tuple[str, str, tuple[int, ...], bytes]


@dataclass(frozen=True, slots=True)
class _Home:
    """Rows [start, start + num_rows) of a tensor that somebody may still hold."""

    tensor: weakref.ref[Tensor]
    start: int
    num_rows: int

    def view(self) -> Tensor | None:
        """The rows, None when the tensor is gone."""
        tensor = self.tensor()
        return None if tensor is None else tensor.detach()[self.start : self.start + self.num_rows]


class SharedTensors:
    """What the models of this process hold, by content. Safe to use from several threads."""

    def __init__(self) -> None:
        self._homes: dict[_Key, list[_Home]] = {}
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<SharedTensors {len(self._homes)} contents, {self.saved_bytes} bytes saved>"

    def hold(self, tensor: Tensor) -> nn.Parameter:
        """A parameter of the same bits: in memory that is held already, else in the tensor's own."""
        if tensor.numel() == 0 or tensor.is_meta or not tensor.is_contiguous():
            return nn.Parameter(tensor, requires_grad=False)
        key = _key(tensor)
        with self._lock:
            homes = self._homes[key] = [home for home in self._homes.get(key, ()) if home.tensor() is not None]
            found = next((view for home in homes if (view := home.view()) is not None and _equal(view, tensor)), None)
            held = nn.Parameter(tensor if found is None else found, requires_grad=False)
            homes.append(_Home(weakref.ref(held), 0, len(held)))
        return held

    def moved(self, parts: Sequence[Tensor], joined: Tensor) -> None:
        """The rows of `parts` are now those of `joined`, one after the other."""
        start = 0
        with self._lock:
            for part in parts:
                if part.numel() > 0 and part.is_contiguous():
                    home = _Home(weakref.ref(joined), start, len(part))
                    self._homes.setdefault(_key(part.detach()), []).append(home)
                start += len(part)

    @property
    def saved_bytes(self) -> int:
        """How much more memory the models would take without sharing. Forgets what is gone."""
        with self._lock:
            for key in list(self._homes):
                self._homes[key] = [home for home in self._homes[key] if home.tensor() is not None]
                if not self._homes[key]:
                    del self._homes[key]
            tensors = {
                id(each): each
                for homes in self._homes.values()
                for home in homes
                if (each := home.tensor()) is not None
            }
        sizes = {number: each.numel() * each.element_size() for number, each in tensors.items()}
        distinct = {each.data_ptr(): sizes[number] for number, each in tensors.items()}
        return sum(sizes.values()) - sum(distinct.values())


def side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """The one tensor whose rows those of `parts` are, without a copy; None where they lie apart."""
    first = parts[0]
    end = first.data_ptr()
    for part in parts:
        is_next = part.data_ptr() == end and part.is_contiguous() and part.shape[1:] == first.shape[1:]
        if not is_next or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += part.numel() * part.element_size()
    num_rows = sum(len(part) for part in parts)
    return first.detach().as_strided((num_rows, *first.shape[1:]), first.stride())


PROCESS_TENSORS = SharedTensors()
"""Of all models of this process: sharing is between models that know nothing of each other."""


def _key(tensor: Tensor) -> _Key:
    """Form and a sample of the content: a few runs of bytes, spread evenly."""
    flat = _bytes(tensor)
    run = 32
    num_runs = min(SAMPLE_BYTES // run, max(1, flat.numel() // run))
    starts = torch.linspace(0, max(0, flat.numel() - run), num_runs, dtype=torch.float64).long().tolist()
    sample = b"".join(bytes(flat[start : start + run].tolist()) for start in starts)
    return str(tensor.device), str(tensor.dtype), tuple(tensor.shape), sample


def _equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit: zeros of both signs differ, and what is no number equals itself."""
    return left.shape == right.shape and torch.equal(_bytes(left), _bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
