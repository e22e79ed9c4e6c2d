"""A supervised process's side of its link to the supervisor; the other side is `child_process.py`.

The link is one end of a socket pair, inherited under the number in FASTCHAT_PARENT_FD. Upward go lines (`ready`, or
`error` and why the process ends); downward goes nothing at all, so that the end of the stream means that the supervisor
is gone, by whatever death. Without the variable every function here does nothing: the process runs alone.
"""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Mapping

from fastchat.errors import ConfigError

PARENT_FD_VARIABLE = "FASTCHAT_PARENT_FD"
READY = "ready"
ERROR = "error "
ORPHAN_LIMIT_S = 2.0
"""How long a process may take to end in order once its supervisor is gone."""


def watch_parent() -> None:
    """End this process soon after its supervisor has ended. Called first thing by every command."""
    descriptor = _descriptor(os.environ)
    if descriptor is None:
        return
    os.set_inheritable(descriptor, False)  # what this process starts is not held alive by it, nor takes its place
    threading.Thread(target=_end_with_parent, args=(descriptor,), name="parent-watch", daemon=True).start()


def tell_ready() -> None:
    """Tell the supervisor that this process answers requests."""
    _tell(READY)


def tell_error(message: str) -> bool:
    """Hand the reason why this process ends to the supervisor; False where there is none to say it."""
    return _tell(ERROR + " ".join(message.splitlines()))


def _tell(line: str) -> bool:
    descriptor = _descriptor(os.environ)
    if descriptor is None:
        return False
    try:
        os.write(descriptor, line.encode() + b"\n")
    except OSError:  # the supervisor is gone
        return False
    return True


def _descriptor(environment: Mapping[str, str]) -> int | None:
    text = environment.get(PARENT_FD_VARIABLE)
    if text is None:
        return None
    try:
        descriptor = int(text)
        is_link = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except (ValueError, OSError):
        is_link = False
    if not is_link:
        raise ConfigError(f"{PARENT_FD_VARIABLE}={text} names no link; only `fastchat serve` sets it, unset it.")
    return descriptor


def _end_with_parent(descriptor: int) -> None:
    try:
        while os.read(descriptor, 1):
            pass
    except OSError:  # a reset is an end too
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(ORPHAN_LIMIT_S)
    os._exit(1)
