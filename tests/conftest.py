"""For all tests: Ctrl-C means in the processes they start what it means in a terminal; Triton runs without a GPU."""

import os
import signal
from pathlib import Path

# A test run that was itself started in the background ignores SIGINT, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton chooses its interpreter when it is imported, and transformers may be what imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
