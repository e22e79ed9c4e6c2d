"""Connections to the app of `edge_app.py`."""

import http.client
from contextlib import contextmanager

import pytest
import structlog

from tests.api.edge_app import Witness, create_app
from tests.gateway.loop_thread import LoopThread


@pytest.fixture(scope="session", autouse=True)
def _plain_tracebacks():
    """Its default draws every local variable of every frame, which takes seconds."""
    structlog.configure([structlog.processors.format_exc_info, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def thread():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture
def witness():
    return Witness()


@pytest.fixture
def connect(thread, witness):
    """Makes connections to the app."""
    with thread.serve(create_app(witness)) as url:

        @contextmanager
        def connection():
            client = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
            try:
                yield client
            finally:
                client.close()

        yield connection


@pytest.fixture
def ask(connect):
    """One request: status, headers, body."""

    def ask(method, path, body=None, headers=None, key="good"):
        with connect() as client:
            client.request(method, path, body, {"Authorization": f"Bearer {key}", **(headers or {})})
            response = client.getresponse()
            return response.status, response.headers, response.read()

    return ask
