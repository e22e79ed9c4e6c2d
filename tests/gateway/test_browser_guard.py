"""A web page gets nothing from a server without keys that its visitor can reach, however it asks."""

from __future__ import annotations

import pytest

ORIGIN = {"Origin": "https://page.example"}
BODY = {"model": "tiny", "messages": []}


@pytest.fixture(scope="module")
def local(cluster):
    """An API server without keys that is called by its own names alone."""
    with cluster.api_server(allowed_hosts=("fastchat.lan",)) as url:
        yield url


@pytest.mark.parametrize(
    "host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "a.localhost", "FastChat.lan.", "10.0.0.7"]
)
def test_own_names_and_addresses_are_answered(cluster, local, host):
    """A rebound name is never an address."""
    assert cluster.get(local, "/v1/models", headers={"Host": host})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "["]
)
def test_rebound_name_is_refused(cluster, local, host):
    """Whatever the route and the method; the body is in OpenAI's shape."""
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/health"), ("GET", "/x")):
        status, headers, body = cluster.get(local, path, method, headers={"Host": host})
        assert status == 403
        assert b"origin_not_allowed" in body
        assert "x-request-id" in headers


@pytest.mark.parametrize("origin", ["https://page.example", "null", "http://localhost:1", "http://[", "http://a]b"])
def test_simple_post_of_a_foreign_page_is_refused(cluster, local, origin):
    """No preflight comes before it, so CORS would let it compute."""
    headers = {"Origin": origin, "Content-Type": "text/plain"}
    assert cluster.post(local, "/v1/chat/completions", BODY, headers=headers)[0] == 403
    assert cluster.get(local, "/v1/models", headers={"Origin": origin})[0] == 200


def test_own_page_allowed_pages_and_programs_may_post(cluster, local):
    """404, since the model is not there: they are past the door."""
    name = local.removeprefix("http://")
    for headers in ({}, {"Origin": local}, {"Origin": f"http://{name}"}):
        assert cluster.post(local, "/v1/chat/completions", BODY, headers=headers)[0] in (404, 503)
    from fastchat.gateway.config import CorsConfig

    with cluster.api_server(cors=CorsConfig(allowed_origins=("https://page.example",))) as url:
        assert cluster.post(url, "/v1/chat/completions", BODY, headers=ORIGIN)[0] in (404, 503)


def test_where_keys_are_needed_they_decide(cluster):
    """A page that holds a key was given it."""
    with cluster.api_server(api_keys=("sk-one",), allowed_hosts=()) as url:
        key = {"Authorization": "Bearer sk-one"}
        assert cluster.get(url, "/v1/models", headers={**key, "Host": "any.example", **ORIGIN})[0] in (200, 503)
        assert cluster.get(url, "/v1/models", headers={"Host": "any.example"})[0] == 401
