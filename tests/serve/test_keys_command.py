"""`fastchat keys` and a running API server that follows it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request

import pytest
from rich.cells import cell_len

from tests.processes import run_command, start_command

LIMIT_S = 15.0
"""The server looks four times a second; the machine may stand still in between."""


@pytest.fixture
def keys(tmp_path):
    """Run `fastchat keys ...` on this test's state directory."""

    def run(*words):
        return run_command("keys_command", *words, state_dir=tmp_path)

    return run


@pytest.fixture
def api(tmp_path):
    with start_command(
        "openai_api_server", "--port", "0", "--controller", "http://127.0.0.1:9", state_dir=tmp_path
    ) as api:
        assert api.url
        yield api


def status(api, key=None, path="/version"):
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(api.url + path, headers=headers), timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def seconds_until(api, expected, key=None):
    began = time.monotonic()
    while status(api, key) != expected:
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    return time.monotonic() - began


def the_id(keys, number=0):
    return json.loads(keys("list", "--json").stdout)[number]["id"]


def test_life_of_a_key_in_a_running_server(api, keys):
    """Open without keys; the first one closes the door; a revoked one is refused within seconds."""
    assert status(api) == 200
    created = keys("create", "--name", "laptop")
    key = created.stdout.strip()
    assert created.stdout == key + "\n"
    assert seconds_until(api, 401) < LIMIT_S
    assert status(api, key) == 200
    assert status(api, path="/health") == 503
    (row,) = json.loads(keys("list", "--json").stdout)
    assert (row["name"], row["state"]) == ("laptop", "valid")
    revoked = keys("revoke", row["id"])
    assert revoked.returncode == 0
    assert seconds_until(api, 401, key) < LIMIT_S
    assert "nobody is let in" in revoked.stdout
    second = keys("create").stdout.strip()
    assert seconds_until(api, 200, second) < LIMIT_S
    assert status(api, key) == 401
    for text in (api.log, created.stderr, keys("list").stdout):
        assert key not in text
        assert second not in text


def test_last_use_is_shown_by_day(api, keys):
    """A day says whether a key is still needed, and no more about its holder."""
    key = keys("create").stdout.strip()
    assert seconds_until(api, 401) < LIMIT_S
    assert "never" in keys("list").stdout.splitlines()[1]
    before = time.strftime("%Y-%m-%d", time.gmtime())
    assert status(api, key) == 200
    deadline = time.monotonic() + 60
    while (used_on := json.loads(keys("list", "--json").stdout)[0]["last_used_on"]) is None:
        assert time.monotonic() < deadline
    assert used_on in (before, time.strftime("%Y-%m-%d", time.gmtime()))


def test_server_that_starts_later_knows_the_keys_beside_its_own(tmp_path, keys):
    """`--api-keys` goes on working."""
    key = keys("create").stdout.strip()
    flags = ("--port", "0", "--host", "0.0.0.0", "--api-keys", "sk-own")
    with start_command("openai_api_server", *flags, state_dir=tmp_path) as api:
        assert [status(api, each) for each in (None, "sk-own", key, "sk-other")] == [401, 200, 200, 401]


def test_store_that_vanishes_lets_nobody_new_in(api, keys, tmp_path):
    """The last known keys hold; a store that is put in its place is read."""
    key = keys("create").stdout.strip()
    assert seconds_until(api, 401) < LIMIT_S
    for file in tmp_path.glob("api-keys*"):
        file.unlink()
    api.wait_for_line("API keys cannot be read, the last known ones stay")
    assert (status(api), status(api, key)) == (401, 200)
    other = keys("create").stdout.strip()
    assert seconds_until(api, 200, other) < LIMIT_S
    assert status(api, key) == 401


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("create", "--expires", "soon"), "write it like 90d, 12h, 30m or 2030-01-31"),
        (("create", "--expires", "2020-01-01"), "is over already"),
        (("create", "--expires", "0d"), "is over already"),
        (("create", "--name", "a\nb"), "printable"),
        (("revoke", "key-123"), "`fastchat keys list` shows the ids"),
        (("revoke", "sk-fc-abc"), "that is a key and not its id"),
    ],
)
def test_what_cannot_be_done_is_one_line(keys, words, hint):
    """Exit code 2, and nothing was made."""
    ended = keys(*words)
    assert ended.returncode == 2
    assert hint in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert json.loads(keys("list", "--json").stdout) == []


def test_list_shows_until_when_a_key_holds(keys):
    """For people, one line each, in columns also where a name is Chinese."""
    keys("create", "--name", "张三的笔记本", "--expires", "2h")
    keys("create", "--name", "long", "--expires", "2099-01-31")
    lines = keys("list").stdout.splitlines()
    assert lines[0].split() == ["ID", "NAME", "MAY", "STATE", "CREATED", "EXPIRES", "LAST", "USED"]
    assert any("long" in line and "2099-01-31 00:00Z" in line for line in lines[1:])
    assert all(" valid " in line for line in lines[1:])
    assert len({cell_len(line[: line.index(" ask ")]) for line in lines[1:]}) == 1
