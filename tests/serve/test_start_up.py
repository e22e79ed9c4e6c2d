"""A start-up that takes long, because a model is loaded, is ended by a signal like everything else."""

import signal
import sys

import pytest

from tests.processes import ServerProcess

PROGRAM = """
import asyncio, logging, threading
from contextlib import asynccontextmanager
from starlette.applications import Starlette
from fastchat.engine.client import ENGINE_THREAD_NAME
from fastchat.serve.arguments import run_command
from fastchat.serve.http_server import bind_listeners, run_server

logging.basicConfig(level="INFO")
threading.Thread(target=threading.Event().wait, name=ENGINE_THREAD_NAME, daemon=True).start()

@asynccontextmanager
async def lifespan(app):
    print("loading", flush=True)
    try:
        await asyncio.Event().wait()
        yield
    finally:
        print("cleaned up")

run_command(lambda _: run_server(Starlette(lifespan=lifespan), bind_listeners("localhost", 0)))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["Waiting for application startup", "loading"])
def test_a_signal_ends_a_start_up_that_is_under_way(number, moment):
    """With exit code 0, what it holds given back, although a thread is still at work."""
    with ServerProcess([sys.executable, "-c", PROGRAM]) as process:
        process.wait_for_line(moment)
        process.signal(number)
        assert process.wait(limit_s=60) == 0
        assert ("loading" in process.log) == ("cleaned up" in process.log)
        assert "Traceback" not in process.log


def test_a_signal_before_the_start_up_keeps_it_from_beginning():
    """The server has taken over the signals and loads its own parts: nobody else would hear of it."""
    early = """
import os, signal

class AtOnce(logging.Handler):
    def emit(self, record):
        if "Started server process" in record.getMessage():
            os.kill(os.getpid(), signal.SIGTERM)

logging.getLogger("uvicorn.error").addHandler(AtOnce())
run_command("""
    with ServerProcess([sys.executable, "-c", PROGRAM.replace("\nrun_command(", early)]) as process:
        assert process.wait(limit_s=60) == 0
        assert "Started server process" in process.log
        assert "loading" not in process.log
        assert "Traceback" not in process.log
