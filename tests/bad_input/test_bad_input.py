"""Every row of docs/bad-input.md, against real processes: answered at once, the next one served, others unharmed."""

from __future__ import annotations

import re
import time

import pytest

from tests.bad_input import table
from tests.bad_input.cases import COMPLETIONS, Case, completion
from tests.bad_input.sending import StreamsBeside, send

ANSWER_LIMIT_S = 10.0
"""Of a refusal. Eight streams and others may share two cores with it: with thirteen on them the longest took 0.9 s."""

INTERNALS = re.compile(
    r"Traceback|\.py\b|0x[0-9a-f]{6,}|/(?:usr|home|opt|root|tmp)/|pydantic|uvicorn|starlette|jinja", re.I
)
"""What no error text may show."""

CONTROL = Case("the next request", 200, body=completion(max_tokens=1), path=COMPLETIONS)


@pytest.mark.parametrize("row", table.ROWS, ids=lambda row: row.number)
def test_bad_input_is_refused_at_once_and_hurts_nobody(target, row):
    """Each case gets its own answer, a good request behind it is served, and eight streams get their texts."""
    with StreamsBeside(target.port, target.streamed_text):
        for case in row.cases:
            answer = send(case, target.with_keys.port if case.needs_key else target.port)
            check_answer(case, answer)
            assert send(CONTROL, target.port).status == 200


def check_answer(case, answer):
    what = (case.what, case.path, answer.body[:500])
    assert answer.status == case.status, what
    if case.status >= 400:
        assert answer.headers["content-type"] == "application/json", what
        assert list(answer.document) == ["error"], what
        assert list(answer.error) == ["message", "type", "param", "code"], what
        assert answer.error["code"] == case.code, what
        assert answer.error["type"] == "invalid_request_error", what
        assert 0 < len(answer.error["message"]) < 1000, what
        assert not INTERNALS.search(answer.error["message"]), what
        assert answer.seconds < ANSWER_LIMIT_S, (what, answer.seconds)
    if case.check is not None:
        case.check(answer)


def test_at_the_end_nothing_is_left_and_the_logs_are_clean(target):
    """No request under way, one line for each request, and no character that a terminal obeys."""
    deadline = time.monotonic() + 60
    while (num := in_flight(target)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert num == 0
    for process in (target.system.api, target.system.worker, target.system.controller):
        log = process.log
        assert "Traceback" not in log
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", log), "a control character in the log"
        assert not re.search("^forged", log, re.MULTILINE)


def in_flight(target):
    text = send(Case("metrics", 200, path="/metrics", method="GET"), target.port).body.decode()
    return float(re.search(r"^fastchat_http_requests_in_flight(?:\{[^}]*\})? (\S+)", text, re.MULTILINE)[1])


def test_the_document_shows_every_row():
    """python scripts/write_bad_input_table.py"""
    assert table.DOCUMENT.read_text() == table.updated(table.DOCUMENT.read_text())
