"""Progress over the files of a checkpoint: a bar on a terminal, plain log lines elsewhere. Called by `weights.py`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

LABEL = "Loading checkpoint shards"

logger = logging.getLogger(__name__)

Report = Callable[[int, int], None]
"""Called with the number of shards loaded and the number of all."""


@contextmanager
def show_progress(num_shards: int) -> Iterator[Report]:
    """Yields a `Report` that draws on standard error, or logs where that is no terminal."""
    if not sys.stderr.isatty():
        yield _log_progress
        return
    with tqdm(total=num_shards, desc=LABEL, file=sys.stderr) as bar:

        def draw(num_loaded: int, _num_shards: int) -> None:
            bar.update(num_loaded - bar.n)

        yield draw


@contextmanager
def show_and_tell(tell: Callable[[float], object]) -> Iterator[Report]:
    """As `show_progress`, and `tell` hears the share that is loaded, from 0 to 1, after each shard."""
    with ExitStack() as stack:
        shown: Report | None = None

        def report(num_loaded: int, num_shards: int) -> None:
            nonlocal shown
            shown = shown or stack.enter_context(show_progress(num_shards))
            shown(num_loaded, num_shards)
            tell(num_loaded / num_shards)

        yield report


def _log_progress(num_loaded: int, num_shards: int) -> None:
    logger.info("%s: %d/%d", LABEL, num_loaded, num_shards)
