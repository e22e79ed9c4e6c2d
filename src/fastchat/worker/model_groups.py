"""Which of a command's folders are models, which are adapters, and whose. Torch-free.

The base of an adapter is, in this order:

1. the one it is given with: `--model-path BASE+ADAPTER`;
2. the folder that its own config names, as it is, beside the adapter, or where the command runs;
3. a model of the same command that is called like the last word of that name (`THUDM/chatglm2-6b`: `chatglm2-6b`).

One engine serves a base, under its own names, with all of its adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastchat.config import expand_home
from fastchat.errors import ConfigError
from fastchat.models.adapter_folder import AnyAdapter, find_adapter
from fastchat.models.checkpoint import Checkpoint
from fastchat.worker.config import ModelSpec
from fastchat.worker.model_needs import PlannedModel

BASE_MARK = "+"


@dataclass(frozen=True, slots=True)
class AdapterGroup:
    """An adapter and the names it is served under."""

    folder: AnyAdapter
    names: tuple[str, ...]
    conv_template: str | None


@dataclass(frozen=True, slots=True)
class ModelGroup:
    """A base and its adapters. One that no flag names itself is served too, under its folder's name."""

    checkpoint: Checkpoint
    names: tuple[str, ...]
    conv_template: str | None
    adapters: tuple[AdapterGroup, ...] = ()
    is_asked_for: bool = True

    @property
    def all_names(self) -> tuple[str, ...]:
        """The base's, then those of its adapters."""
        return (*self.names, *(name for adapter in self.adapters for name in adapter.names))


def group_models(specs: Sequence[ModelSpec], *, may_repeat: bool = False) -> tuple[ModelGroup, ...]:
    """One group for each base, in the order given. Raises `CheckpointError` or `ConfigError` in one line.

    `may_repeat`: a folder may be there twice, as in a plan for two workers; models that are served need distinct names.
    """
    bases: list[ModelSpec] = []
    adapters: list[tuple[ModelSpec, AnyAdapter, Path | None]] = []
    for spec in specs:
        base, path = _split(spec.path)
        folder = find_adapter(path)
        if folder is not None:
            adapters.append((spec, folder, base))
        elif base is not None:
            raise ConfigError(f"{path} holds no adapter; in BASE{BASE_MARK}ADAPTER the second folder is the adapter's.")
        else:
            bases.append(spec)
    opened = [(spec, Checkpoint.open(spec.path)) for spec in bases]
    of_base: dict[int, list[AdapterGroup]] = {}
    for spec, folder, given in adapters:
        index = _find_base(folder, given, opened)
        group = AdapterGroup(folder, spec.names or (folder.name,), spec.conv_template)
        of_base.setdefault(index, []).append(group)
    groups = tuple(
        ModelGroup(
            checkpoint,
            spec.names or (checkpoint.name,),
            spec.conv_template,
            adapters=tuple(of_base.get(index, ())),
            is_asked_for=index < len(bases),
        )
        for index, (spec, checkpoint) in enumerate(opened)
    )
    if not may_repeat:
        _check_names([name for group in groups for name in group.all_names])
    return groups


def planned_group(group: ModelGroup) -> PlannedModel:
    """For the memory plan. Raises `CheckpointError` for files that cannot be loaded."""
    return PlannedModel.of(group.checkpoint, group.names[0], [adapter.folder for adapter in group.adapters])


def _split(path: Path) -> tuple[Path | None, Path]:
    """`BASE+ADAPTER` in two; a folder whose own name has the mark stays whole."""
    text = str(path)
    if BASE_MARK in text and not expand_home(path).is_dir():
        parts = text.split(BASE_MARK)
        for number in range(1, len(parts)):
            base, adapter = (Path(BASE_MARK.join(half)) for half in (parts[:number], parts[number:]))
            if expand_home(base).is_dir() and expand_home(adapter).is_dir():
                return base, adapter
    return None, path


def _find_base(folder: AnyAdapter, given: Path | None, opened: list[tuple[ModelSpec, Checkpoint]]) -> int:
    """The index of its base in `opened`, to which one is added that no flag names."""
    if given is not None:
        return _index_of(given, opened)
    for path in _named_folders(folder):
        if (path / "config.json").is_file():
            return _index_of(path, opened)
    last_word = folder.base_name.rstrip("/").rpartition("/")[2]
    for index, (_, checkpoint) in enumerate(opened):
        if last_word == checkpoint.name:
            return index
    said = f"its base is called {folder.base_name!r}" if folder.base_name else "it does not say what its base is"
    raise ConfigError(
        f"{folder.path} is an adapter, and {said}, which is no folder here; give the folder of its base with it: "
        f"--model-path BASE{BASE_MARK}{folder.path}."
    )


def _named_folders(folder: AnyAdapter) -> Iterator[Path]:
    if folder.base_name:
        yield folder.path / folder.base_name  # an absolute name stays what it is
        yield folder.path.parent / folder.base_name
        yield Path(folder.base_name)


def _index_of(path: Path, opened: list[tuple[ModelSpec, Checkpoint]]) -> int:
    resolved = expand_home(path).resolve()
    for index, (_, checkpoint) in enumerate(opened):
        if checkpoint.path.resolve() == resolved:
            return index
    opened.append((ModelSpec(path), Checkpoint.open(path)))
    return len(opened) - 1


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"Two models are named {name!r}; give each its own with --model-names.")
        if any("\ud800" <= letter <= "\udfff" for letter in name):  # bytes of a folder's name, read in another encoding
            why = "cannot be read in this locale; set LANG=C.UTF-8, or give another with --model-names."
            raise ConfigError(f"The name {name!a} {why}")
