"""Adapters that come and go while their base is served.

Adding one wakes its base, makes room for it like for a model, and loads it between two steps; until that is done, and
where it fails, everything is as before. Removing one takes its names away at once: what runs with it, or waits for its
base, ends in peace, and then its memory is free.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path

import structlog

from fastchat.api.served_model import ServedModel, ServedModels
from fastchat.errors import (
    CheckpointError,
    ConflictError,
    EngineError,
    InvalidRequestError,
    PermissionDeniedError,
)
from fastchat.models.adapter_folder import AnyAdapter, find_adapter
from fastchat.worker.loaded_model import OpenedAdapter, OpenedModel
from fastchat.worker.model_groups import AdapterGroup
from fastchat.worker.model_keeper import ModelKeeper
from fastchat.worker.present_adapters import HeldAdapter

MAX_NAME_CHARACTERS = 200

_log = structlog.stdlib.get_logger(__name__)


class AdapterControl:
    """The adapters of one worker's models. `folder` is the one below which new ones may lie; None: none may come.

    `on_change` is called when the worker's names have changed.
    """

    def __init__(
        self,
        keeper: ModelKeeper,
        models: ServedModels,
        opened: Sequence[OpenedModel],
        *,
        folder: Path | None,
        on_change: Callable[[], None],
    ) -> None:
        self._keeper = keeper
        self._models = models
        self._opened = {each.names[0]: each for each in opened}
        self._folder = folder
        self._on_change = on_change
        self._coming: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the block lasts, removed adapters are freed when their last user has gone."""
        for opened in self._opened.values():
            opened.present.on_unused = partial(self._release_later, opened)
        try:
            yield
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def add(self, base_name: str, name: str, path: str) -> str:
        """Serve the adapter in the folder `path` as `name`; returns its base's first name once it can be asked for.

        Raises `ModelNotFoundError` for the base, `PermissionDeniedError` for the folder, `ConflictError` for a taken
        name, `InvalidRequestError` for what cannot be loaded, `UnavailableError` where it has no room, and what loading
        the base raises.
        """
        base = self._base(base_name)
        opened = self._opened[base.names[0]]
        check_adapter_name(name)
        with self._name_kept(name):
            folder, text_side = await asyncio.to_thread(self._open, opened, name, path)
            held = HeldAdapter(
                opened.present.free_key(name), str(folder.path), num_bytes=folder.num_values * opened.value_bytes
            )
            served = opened.served_adapter(base, text_side, key=held.key)
            if served.max_context < 1:
                raise _refused(f"{path}: its prefix of {folder.num_slots} slots leaves no room in the KV cache.")
            await self._load(opened, held)
            self._models.add(served)
        _log.info("adapter added", model=base.names[0], adapter=name, folder=held.source, num_bytes=held.num_bytes)
        self._on_change()
        return base.names[0]

    async def remove(self, base_name: str, name: str) -> str:
        """Take an adapter's names away; returns its base's first name when its memory is free, or while it still runs.

        Raises `ModelNotFoundError`, or `InvalidRequestError` for a name that is no adapter's of that base.
        """
        base = self._base(base_name)
        served = self._models.find(name)
        if not served.adapter or served.base_name != base.names[0]:
            raise InvalidRequestError(f"`{name}` is no adapter of `{base_name}`.", param="name")
        self._models.remove(served)
        opened = self._opened[base.names[0]]
        held = opened.present.retire(served.adapter)
        _log.info("adapter removed", model=base.names[0], adapter=name, num_users=held.num_users)
        self._on_change()
        if held.num_users == 0:
            await self._release_later(opened, held)
        return base.names[0]

    def names_of(self, key: str) -> tuple[str, ...]:
        """The adapters that a model is asked for by, each by its first name."""
        return tuple(name for name, model in self._models if model.base_name == key and name == model.names[0])

    async def _load(self, opened: OpenedModel, held: HeldAdapter) -> None:
        """Bring it into the engine that there is, or comes. Where that fails all is as before."""
        key = opened.names[0]
        ticket = self._keeper.take(key, more_bytes=held.num_bytes)
        try:
            engine = await self._keeper.granted(ticket)
            try:
                await engine.add_adapter(held.key, held.source)
            except BaseException:
                self._keeper.residency.shrink(key, held.num_bytes)
                raise
            opened.present.add(held)
        except CheckpointError as error:
            # What is wrong with the base has failed its load, which says so itself.
            raise (_refused(error.message) if ticket.is_granted else error) from None
        finally:
            self._keeper.give_back(ticket)

    def _release_later(self, opened: OpenedModel, held: HeldAdapter) -> asyncio.Task[None]:
        opened.present.drop(held)
        task = asyncio.get_running_loop().create_task(self._release(opened.names[0], held))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _release(self, key: str, held: HeldAdapter) -> None:
        """Free what nobody uses. An engine that is being loaded may have been told to read it."""
        await self._keeper.not_loading(key)
        engine = self._keeper.engine(key)
        if engine is not None:
            with suppress(EngineError):  # its engine ends, and the adapter with it
                await engine.remove_adapter(held.key)
        self._keeper.residency.shrink(key, held.num_bytes)
        self._keeper.changed()
        _log.info("adapter's memory is free", model=key, adapter=held.key, num_bytes=held.num_bytes)

    def _base(self, name: str) -> ServedModel:
        model = self._models.find(name)
        if model.adapter:
            raise InvalidRequestError(
                f"`{name}` is an adapter itself; name its base, `{model.base_name}`.", param="model"
            )
        return model

    @contextmanager
    def _name_kept(self, name: str) -> Iterator[None]:
        """Nobody else takes the name while the block lasts."""
        if name in self._models or name in self._coming:
            raise ConflictError(
                f"A model named `{name}` is served here or about to be; remove it first or choose another name.",
                code="model_name_taken",
            )
        self._coming.add(name)
        try:
            yield
        finally:
            self._coming.discard(name)

    def _open(self, opened: OpenedModel, name: str, path: str) -> tuple[AnyAdapter, OpenedAdapter]:
        """An adapter and its text side, from its small files and headers, which are read here."""
        folder = self._allowed_folder(path)
        try:
            adapter = find_adapter(folder)
            if adapter is None:
                raise _refused(f"{path} holds no adapter: adapter_config.json beside its weights, or a prefix encoder.")
            _ = adapter.num_values  # kept in it: reading headers is nothing for the event loop
            return adapter, opened.open_adapter(AdapterGroup(adapter, (name,), None))
        except CheckpointError as error:
            raise _refused(error.message) from None

    def _allowed_folder(self, path: str) -> Path:
        """Where `path` leads, links followed. Nothing outside of the operator's folder is looked at."""
        if self._folder is None:
            raise PermissionDeniedError(
                "This worker takes no adapters while it runs; start it with --adapter-dir FOLDER and put them there.",
                code="adapters_not_allowed",
            )
        root = self._folder.resolve()
        try:
            folder = (root / path).resolve()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL, links in a circle
            raise _refused("path: no folder can be called so.") from None
        if root not in folder.parents:
            raise PermissionDeniedError(
                "path must be a folder below the one that the worker was given as --adapter-dir.",
                param="path",
                code="adapters_not_allowed",
            )
        return folder


def check_adapter_name(name: str) -> None:
    """Raise `InvalidRequestError` for what cannot be asked for, or cannot stand in a URL of the control routes."""
    is_clean = name.isprintable() and name == name.strip() and "/adapters/" not in f"/{name}/"
    if not (is_clean and 1 <= len(name) <= MAX_NAME_CHARACTERS):
        raise InvalidRequestError(
            f"name: must be 1 to {MAX_NAME_CHARACTERS} printable characters, without spaces around it and without a "
            "part `adapters` between slashes.",
            param="name",
            code="invalid_value",
        )


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(message, param="path", code="adapter_refused")
