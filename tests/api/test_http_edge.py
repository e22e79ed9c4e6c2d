"""The HTTP edge: errors as OpenAI's bodies, request ids, keys, and work that ends with its client."""

import json
import time

import pytest

from fastchat.api.http_edge import error_body, error_event
from fastchat.errors import (
    AuthenticationError,
    BodyTooLargeError,
    CheckpointError,
    ContextLengthError,
    EngineError,
    InvalidRequestError,
    ModelNotFoundError,
    PermissionDeniedError,
    RouteNotFoundError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (InvalidRequestError("x", param="n"), 400, "invalid_request_error", None),
        (
            ContextLengthError(num_prompt_tokens=9, max_tokens=8, max_context=16),
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (AuthenticationError("x"), 401, "invalid_request_error", "invalid_api_key"),
        (PermissionDeniedError("x"), 403, "invalid_request_error", "permission_denied"),
        (ModelNotFoundError("a", ["b"]), 404, "invalid_request_error", "model_not_found"),
        (RouteNotFoundError("x"), 404, "invalid_request_error", "route_not_found"),
        (BodyTooLargeError(7), 413, "invalid_request_error", "body_too_large"),
        (UnavailableError("x", code="no_worker"), 503, "server_error", "no_worker"),
        (EngineError("x"), 500, "server_error", "internal_error"),
        (CheckpointError("x"), 500, "server_error", "internal_error"),
    ],
)
def test_every_error_has_one_status_and_openais_shape(error, status, kind, code):
    got, body, _ = error_body(error, "abc")
    document = json.loads(body)
    assert list(document) == ["error"]
    assert list(document["error"]) == ["message", "type", "param", "code"]
    assert (got, document["error"]["type"], document["error"]["code"]) == (status, kind, code)
    assert error_event(error, "abc") == b"data: " + body + b"\n\n"
    assert ("its log has the cause (request id abc)" in document["error"]["message"]) == (status == 500)


@pytest.mark.parametrize(("asked", "told"), [(0, "1"), (30, "30"), (7200, "120")])
def test_a_client_is_told_to_come_back_within_two_minutes(asked, told):
    """OpenAI's client gives up for good when Retry-After is longer."""
    assert error_body(UnavailableError("x", retry_after_s=asked))[2] == {"retry-after": told}


def test_a_message_that_is_no_unicode_still_goes_out():
    assert json.loads(error_body(InvalidRequestError("a\ud800b"))[1])["error"]["message"] == "a?b"


@pytest.mark.parametrize("path", ["/bug", "/engine"])
def test_our_own_fault_is_a_constant_text_with_the_request_id(ask, path):
    status, headers, body = ask("GET", path)
    message = json.loads(body)["error"]["message"]
    request_id = headers["x-request-id"]
    assert status == 500
    assert message == f"The server failed to answer this request; its log has the cause (request id {request_id})."


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nope", 404, "route_not_found"), ("PUT", "/json", 405, "method_not_allowed")],
)
def test_unknown_routes_and_methods_have_the_same_shape(ask, method, path, status, code):
    got, headers, body = ask(method, path)
    assert (got, json.loads(body)["error"]["code"]) == (status, code)
    assert headers["x-request-id"]


def test_a_declared_body_that_is_wrong_is_a_400_that_names_the_field(ask):
    status, _, body = ask("POST", "/item", '{"size": "big"}', {"Content-Type": "application/json"})
    assert (status, json.loads(body)["error"]["param"]) == (400, "size")


@pytest.mark.parametrize(("sent", "is_taken"), [("abc-123_X", True), ("", False), ("a b", False), ("x" * 65, False)])
def test_a_plain_id_of_our_own_header_is_taken(ask, sent, is_taken):
    _, headers, _ = ask("GET", "/answer", headers={"x-fastchat-request-id": sent, "x-request-id": "theirs"})
    assert (headers["x-request-id"] == sent) == is_taken
    assert headers["x-request-id"] != "theirs"


def test_work_for_a_whole_answer_is_cancelled_when_its_client_leaves(thread, connect, witness):
    with connect() as client:
        client.request("GET", "/work", headers={"Authorization": "Bearer good"})
        thread.run(witness.work_began.wait())
        left_at = time.monotonic()
    thread.run(witness.closed.wait())
    assert witness.closed_at - left_at < 10


def test_work_that_is_done_is_answered(ask):
    assert ask("GET", "/answer")[::2] == (200, b'{"answer":42}')


@pytest.mark.parametrize("path", ["/answer", "/nope", "/livez/", "/stream/good"])
def test_no_path_but_the_open_ones_is_reached_without_a_key(ask, path):
    for key in ("bad", "", "gööd"):
        status, headers, body = ask("GET", path, key=key.encode().decode("latin-1"))
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
        assert headers["x-request-id"]


def test_an_open_path_needs_no_key(ask):
    assert ask("GET", "/livez", key="bad")[0] == 404  # it went through to the routes, which have none


def test_a_check_that_fails_lets_nobody_in(ask):
    assert ask("GET", "/answer", key="explode")[0] == 500


@pytest.mark.parametrize(("key", "status"), [("bad", 401), ("good", 101)])
def test_a_websocket_needs_the_key_too(connect, key, status):
    handshake = {
        "Authorization": f"Bearer {key}",
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    }
    with connect() as client:
        client.request("GET", "/socket", headers=handshake)
        assert client.getresponse().status == status
