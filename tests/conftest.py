"""For all tests: Ctrl-C means in the processes they start what it means in a terminal; Triton runs without a GPU;
what a command configures in the process of the tests is undone; no example of hypothesis has a deadline; and who runs
which, where several processes share them.
"""

import logging
import os
import re
import signal
from pathlib import Path

import hypothesis
import pytest
import structlog
from xdist.scheduler import LoadScopeScheduling

# A test run that was itself started in the background ignores SIGINT, and its children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton chooses its interpreter when it is imported, and transformers may be what imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tiny models gain nothing from a second thread, in this process and in those it starts, and the machine is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests speak to this machine only: no proxy of the surroundings comes between.
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "*"

LONGEST_FIRST = ("tests/web/", "tests/serve/", "tests/bad_input/", "tests/worker/", "tests/test_", "tests/security/")
"""What starts most processes. Begun late it would leave all but one of the test processes idle at the end."""
SHARES_SERVERS = re.compile("tests/(web|bad_input|security|terminal|worker|arena)/")
"""Folders whose files share servers of the scopes `package` and `session`."""


class WholeFoldersScheduling(LoadScopeScheduling):
    """A file is run by one process, and so is a folder whose files share servers: they are started once."""

    def _split_scope(self, nodeid: str) -> str:
        folder = SHARES_SERVERS.match(nodeid)
        return folder[0] if folder else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # the order is that of `pytest_collection_modifyitems`
    return WholeFoldersScheduling(config, log)


def pytest_collection_modifyitems(items):
    """The longest first; the order within a file stays."""

    def rank(item):
        return next((at for at, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)), len(LONGEST_FIRST))

    items.sort(key=rank)


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
