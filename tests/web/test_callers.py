"""Whom the page answers: those who call it by a name of its own, and of web pages only itself may write."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastchat.errors import ConfigError
from fastchat.serve.gradio_web_server import create_page_parser, page_config
from fastchat.web.guard import Guard
from tests.web.canary import call

PATHS = (("GET", "/"), ("GET", "/page/models"), ("POST", "/gradio_api/queue/join"), ("GET", "/nothing"))


def write(port, **headers):
    """A cancelled event that never was: the least that a page may write."""
    body = b'{"session_hash": "a", "fn_index": 0, "event_id": "b"}'
    return call(port, "POST", "/gradio_api/cancel", body, content_type="application/json", **headers)


@pytest.mark.parametrize(
    "host", ["localhost:7860", "LOCALHOST", "a.localhost", "127.0.0.1", "[::1]:7860", "10.0.0.7", "fastchat.lan.:80"]
)
def test_own_names_and_addresses_are_answered(page_server, host):
    """Addresses too: nobody can point one at another machine."""
    assert call(page_server.port, "GET", "/page/models", host=host).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7860", "localhost.evil.example", "127.0.0.1.evil.example", "[", ":80"]
)
def test_a_name_that_somebody_points_here_is_refused(page_server, host):
    """Whatever the path and the method, in a line that names the flag."""
    for method, path in PATHS:
        answer = call(page_server.port, method, path, host=host)
        assert (answer.status, b"--allowed-hosts" in answer.body) == (403, True)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("127.0.0.1:7860", "http://evil.example"),
        ("127.0.0.1:7860", "http://127.0.0.1:3000"),
        ("127.0.0.1:7860", "http://localhost:7860"),
        ("127.0.0.1:7860", "http://["),
        ("fastchat.lan:7860", "http://fastchat.lan"),
        ("fastchat.lan", "file://fastchat.lan"),
    ],
)
def test_pages_of_another_origin_write_nothing(page_server, host, origin):
    """Also of another port of the same machine, and also from browsers that tell nothing but the origin."""
    answer = write(page_server.port, host=host, origin=origin)
    assert (answer.status, b"--allowed-hosts" in answer.body) == (403, True)


@pytest.mark.parametrize(
    ("host", "headers"),
    [
        ("127.0.0.1:7860", {}),
        ("127.0.0.1:7860", {"origin": "http://127.0.0.1:7860"}),
        ("fastchat.lan", {"origin": "https://FastChat.lan"}),
        ("fastchat.lan:443", {"origin": "https://fastchat.lan"}),
        ("127.0.0.1:7860", {"origin": "http://fastchat.lan"}),
        ("127.0.0.1:7860", {"origin": "https://any.example", "sec_fetch_site": "same-origin"}),
    ],
    ids=["program", "own", "TLS at a proxy", "port written out", "Host of the proxy", "the browser vouches"],
)
def test_the_page_itself_and_programs_may_write(page_server, host, headers):
    """Behind every proxy that keeps `Host`, or whose name was given, or whom the browser calls by TLS."""
    assert write(page_server.port, host=host, **headers).status == 200


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), ()),
        (("--host", "127.0.0.1", "--allowed-hosts", "a.lan,b.lan"), ("a.lan", "b.lan")),
        (("--gradio-root-path", "https://a.example/chat/"), ("a.example",)),
        (("--gradio-root-path", "/chat"), ()),
        (("--host", "0.0.0.0"), None),
        (("--host", "my.lan"), None),
        (("--host", "my.lan", "--allowed-hosts", "a.lan"), ("my.lan", "a.lan")),
    ],
)
def test_who_listens_for_others_is_called_by_any_name_until_told(flags, names):
    """A page for this machine is called by its names alone, and by those that a flag gives."""
    assert page_config(create_page_parser().parse_args(flags)).allowed_hosts == names


def test_any_name_passes_where_none_is_given():
    """The writing pages of other origins do not."""

    async def status(method, **headers):
        answers = []

        async def answer(_scope, _receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def note(message):
            answers.append(message)

        async def receive():
            return {"type": "http.request", "body": b""}

        named = [(name.encode(), value.encode()) for name, value in headers.items()]
        path = "/" if method == "GET" else "/gradio_api/cancel"
        scope = {"type": "http", "method": method, "path": path, "headers": named}
        await Guard(answer, allowed_hosts=None)(scope, receive, note)
        return answers[0]["status"]

    async def statuses():
        own, other = "http://any.example", "http://other.example"
        asked = (("GET", {}), ("POST", {"origin": own}), ("POST", {"origin": other}))
        return [await status(method, host="any.example", **headers) for method, headers in asked]

    with ThreadPoolExecutor(1) as pool:  # in this one the browser's loop runs
        assert pool.submit(asyncio.run, statuses()).result() == [200, 200, 403]


@pytest.mark.parametrize("flags", [("--allowed-hosts", "a.lan:80"), ("--gradio-root-path", "http://[")])
def test_what_is_no_name_is_refused(flags, capsys):
    """In one line that names the flag."""
    with pytest.raises((SystemExit, ConfigError)):
        page_config(create_page_parser().parse_args(flags))
    assert flags[0] in capsys.readouterr().err
