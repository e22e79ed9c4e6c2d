"""A model's side for adapters: reads them, and computes each row of a step with its own.

Implements `engine.adapters.AdapterHost` without knowing it. A model that was never given an adapter is left as it is;
with the first one its linears are wrapped, and a step without adapters costs them one look at an empty tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastchat.errors import CheckpointError
from fastchat.models.adapter_folder import PrefixFolder, find_adapter
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.lora import LoraChange, find_places, load_lora
from fastchat.models.prefix_tuning import PrefixChange, load_prefix
from fastchat.native.low_rank import add_low_rank


class ChangedRows(Protocol):
    """`change` holds for rows [start, stop) of a step."""

    @property
    def change(self) -> LoraChange | PrefixChange:
        """What is added there."""

    @property
    def start(self) -> int:
        """The first row."""

    @property
    def stop(self) -> int:
        """One past the last."""


class StepRows:
    """Whose rows are whose in the forward pass that comes: one object, known to all wrapped modules."""

    def __init__(self) -> None:
        self.changed: Sequence[ChangedRows] = ()


class AdaptedLinear(nn.Module):
    """A linear whose output is changed for the rows that have an adapter."""

    def __init__(self, base: nn.Module, name: str, step: StepRows) -> None:
        super().__init__()
        self.base = base
        self.name = name
        self._step = step

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., K) -> (..., N); a packed batch has one row for each token."""
        output: Tensor = self.base(inputs)
        if self._step.changed:
            rows, flat = inputs.reshape(-1, inputs.shape[-1]), output.view(-1, output.shape[-1])
            groups = [
                (each.start, each.stop, change)
                for each in self._step.changed
                if (change := each.change.by_module.get(self.name)) is not None
            ]
            if groups:
                add_low_rank(flat, rows, groups)
        return output


class ModelAdapters:
    """The adapters' side of one model."""

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        self._model = model
        self._checkpoint = checkpoint
        self._places = find_places(model)
        self._step = StepRows()
        self._is_wrapped = False

    def load(self, source: str) -> LoraChange | PrefixChange:
        """Read the adapter in a folder. Raises `CheckpointError` in one line for what does not fit the model."""
        folder = find_adapter(Path(source))
        if folder is None:
            raise CheckpointError(f"{source}: no adapter (adapter_config.json beside its weights) is in this folder")
        if isinstance(folder, PrefixFolder):
            return self._load_prefix(folder)
        change = load_lora(
            folder, self._places, self._checkpoint.family.rename, dtype=self._model.dtype, device=self._model.device
        )
        if not self._is_wrapped:
            self._wrap()
        return change

    def _load_prefix(self, folder: PrefixFolder) -> PrefixChange:
        if self._checkpoint.family.name != "chatglm":
            raise CheckpointError(
                f"{folder.path}: a prefix of ChatGLM, but its base is another model; give its own base"
            )
        return load_prefix(folder, self._model.config, dtype=self._model.dtype, device=self._model.device)

    def use(self, rows: Sequence[ChangedRows]) -> None:
        """Compute the next forward pass so."""
        self._step.changed = rows

    def _wrap(self) -> None:
        decoder: Any = self._model.get_decoder()  # Any: a module of transformers
        for name in {place.module for place in self._places.values()}:
            parent_name, _, leaf = name.rpartition(".")
            parent = decoder.layers.get_submodule(parent_name)
            setattr(parent, leaf, AdaptedLinear(getattr(parent, leaf), name, self._step))
        self._is_wrapped = True
