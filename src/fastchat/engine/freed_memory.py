"""Memory of models that left goes back to the operating system."""

import ctypes
import gc
import sys


def give_back_freed_memory() -> None:
    """Free what is held in circles, and tell the C library to keep nothing of what was freed.

    An engine and its parts know each other, and together they hold all the weights. glibc keeps tensors of less than
    32 MiB for later (`man malloc_trim`), in which the next model's seldom fit. Takes up to a second; any thread.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
