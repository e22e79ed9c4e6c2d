"""How little a serving process may do: no new privileges, no core dump, files of its own for its owner alone."""

from __future__ import annotations

import ctypes
import os
import sys

MAX_OPEN_FILES = 65536
"""Enough for tens of thousands of streams, where the system allows it."""
_PR_SET_NO_NEW_PRIVS = 38  # linux/prctl.h


def harden_process() -> None:
    """For this process and all that it starts. What a system does not offer is left out."""
    if sys.platform == "win32":
        return
    import resource  # there is none on Windows

    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # memory holds prompts and keys
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
