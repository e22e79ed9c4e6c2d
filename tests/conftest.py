"""For all tests: Ctrl-C means in the processes they start what it means in a terminal; Triton runs without a GPU;
what a command configures in the process of the tests is undone; no example of hypothesis has a deadline.
"""

import logging
import os
import signal
from pathlib import Path

import hypothesis
import pytest
import structlog

# A test run that was itself started in the background ignores SIGINT, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton chooses its interpreter when it is imported, and transformers may be what imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# A loaded machine makes any example slow.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def _logging_as_before():
    """A command that runs in the test's process configures logging for all of it."""
    settings, root = structlog.get_config(), logging.getLogger()
    level = root.level
    yield
    structlog.configure(**settings)
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own are of its classes
            root.removeHandler(handler)
