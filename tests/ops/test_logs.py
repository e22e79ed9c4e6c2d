"""Laws of the log: one event is one line, in FastChat's format, without secrets."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import re

import pytest
import structlog

from fastchat.ops.access_log import AccessLog
from fastchat.ops.logs import configure_logging, log_arguments

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| [A-Z]+ \| [\w.]+ \| .+")


@pytest.fixture
def stream():
    """The log of a process named `controller`; logging is put back afterwards."""
    root = logging.getLogger()
    handlers, level, config = root.handlers[:], root.level, structlog.get_config()
    written = io.StringIO()
    configure_logging("controller", stream=written)
    yield written
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**config)
    logging.captureWarnings(capture=False)


def test_our_lines_have_fastchats_format(stream):
    """Time, level, process, message, then facts in the order given."""
    structlog.stdlib.get_logger("fastchat.x").info("worker registered", worker_id="w1", load_s=0.25, name="两个 词")
    line = stream.getvalue()
    assert LINE.fullmatch(line.rstrip("\n"))
    assert line.endswith('| INFO | controller | worker registered worker_id=w1 load_s=0.25 name="两个 词"\n')


def test_library_lines_keep_their_level_and_name(stream):
    """uvicorn's INFO is INFO, not ERROR as in FastChat's log; scripts wait for this text."""
    logging.getLogger("uvicorn.error").info(
        "Uvicorn running on %s://%s:%d (Press CTRL+C to quit)", "http", "localhost", 21001, extra={"color_message": "x"}
    )
    text = "| INFO | uvicorn | Uvicorn running on http://localhost:21001 (Press CTRL+C to quit)\n"
    assert stream.getvalue().endswith(text)


def test_debug_lines_are_off_and_warnings_are_lines(stream):
    """Info is what an operator cares for."""
    structlog.stdlib.get_logger("fastchat.x").debug("for developers")
    logging.getLogger("lib").debug("for developers")
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    "bad", ["a\r\n2026-01-01 00:00:00 | ERROR | x | y", "\x1b[31mred", "\u2028line", "\x00", "\x85"]
)
def test_nothing_can_forge_a_line(stream, bad):
    """Line ends and escape sequences are escaped in messages, values and tracebacks."""
    log = structlog.stdlib.get_logger("fastchat.x")
    log.info("seen", path=bad)
    log.info(bad)
    logging.getLogger("lib").warning("said %s", bad)
    log.error("failed", exc_info=ValueError(bad))
    lines = stream.getvalue().split("\n")
    assert lines.pop() == ""
    events = [line for line in lines if not line.startswith("    | ")]
    assert len(events) == 4
    assert all(LINE.fullmatch(line) for line in events)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", stream.getvalue())


def test_arguments_are_fastchats_first_line_with_secrets_masked(stream):
    """args: Namespace(...), keys never."""
    arguments = argparse.Namespace(host="localhost", port=21001, api_keys=["sk-secret"], cluster_token="tok-secret")
    log_arguments(arguments)
    expected = (
        "| INFO | controller | args: Namespace(host='localhost', port=21001, api_keys='***', cluster_token='***')"
    )
    assert expected in stream.getvalue()


def test_secret_fields_are_masked_everywhere(stream):
    """By the name of the field."""
    structlog.stdlib.get_logger("fastchat.x").info(
        "call", authorization="Bearer sk-secret", token="sk-secret", model="m"
    )
    assert "sk-secret" not in stream.getvalue()
    assert "model=m" in stream.getvalue()


def call(app, path="/v1/models", query=b"key=sk-secret"):
    """One GET through an ASGI app."""
    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "query_string": query,
        "headers": [(b"authorization", b"Bearer sk-secret")],
        "client": ("127.0.0.1", 9),
    }

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(_message):
        pass

    asyncio.run(AccessLog(app)(scope, receive, send))


async def answer(scope, receive, send):
    headers = [(b"x-request-id", b"abc")]
    await send({"type": "http.response.start", "status": 404, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


def test_each_request_is_one_line_without_query_and_key(stream):
    """Method, path, status, time and the id that the client got."""
    call(answer)
    (line,) = stream.getvalue().splitlines()
    assert re.search(
        r"request method=GET path=/v1/models status=404 duration_s=\S+ client=127.0.0.1 request_id=abc$", line
    )
    assert "secret" not in line


def test_probes_make_no_line(stream):
    """Health checks come every few seconds."""
    call(answer, path="/livez")
    assert stream.getvalue() == ""


def test_client_that_left_is_a_line_with_499(stream):
    """A request that ended before it was answered is still seen."""

    async def leave(scope, receive, send):
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        call(leave)
    assert "status=499" in stream.getvalue()
