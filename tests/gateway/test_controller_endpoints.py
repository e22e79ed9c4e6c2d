"""FastChat's endpoints of the controller keep their shapes; nothing but health answers without the cluster token."""

from __future__ import annotations

import http.client
import json

import pytest

from tests.processes import start_command

TOKEN = "the-token-of-this-test-cluster"
STATUS = {"model_names": ["b", "a"], "speed": 1, "queue_length": 2}
REGISTRATION = {"worker_name": "http://127.0.0.1:9/v1/", "check_heart_beat": False, "worker_status": STATUS}


@pytest.fixture(scope="module")
def controller(tmp_path_factory):
    with start_command(
        "controller",
        "--port",
        "0",
        state_dir=tmp_path_factory.mktemp("state"),
        environment={"FASTCHAT_CLUSTER_TOKEN": TOKEN},
    ) as process:
        yield process


@pytest.fixture
def ask(controller):
    """Send one request; gives back (status, JSON or text). `token` None sends none."""

    def send(path, body=None, *, method="POST", token=TOKEN):
        connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=10)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        is_json = response.headers.get_content_type() == "application/json"
        return response.status, json.loads(text) if is_json and text else text

    return send


def test_registered_server_is_listed_chosen_and_dropped(ask):
    """The life of an OpenAI-compatible server in FastChat's words."""
    assert ask("/list_models") == (200, {"models": []})
    assert ask("/get_worker_address", {"model": "a"}) == (200, {"address": ""})
    assert ask("/register_worker", REGISTRATION) == (200, None)
    assert ask("/list_models") == (200, {"models": ["a", "b"]})
    assert ask("/list_language_models") == (200, {"models": ["a", "b"]})
    assert ask("/list_multimodal_models") == (200, {"models": []})
    assert ask("/get_worker_address", {"model": "a"}) == (200, {"address": "http://127.0.0.1:9"})
    assert ask("/get_worker_address", {"model": "c"}) == (200, {"address": ""})
    expected = {"model_names": ["a", "b"], "speed": 1, "queue_length": 2}
    assert ask("/worker_get_status") == (200, expected)
    assert ask("/refresh_all_workers") == (200, None)
    assert ask("/list_models") == (200, {"models": []})


def test_heart_beat_says_whether_the_worker_is_known(ask):
    """False tells it to register again."""
    beat = {"worker_name": "http://127.0.0.1:8", "queue_length": 7}
    assert ask("/receive_heart_beat", beat) == (200, {"exist": False})
    registration = {**REGISTRATION, "worker_name": "http://127.0.0.1:8", "check_heart_beat": True}
    assert ask("/register_worker", registration)[0] == 200
    assert ask("/receive_heart_beat", beat) == (200, {"exist": True})
    assert ask("/worker_get_status")[1]["queue_length"] == 7
    ask("/refresh_all_workers")


def test_sign_of_life_of_fastchat(ask):
    """GET /test_connection."""
    assert ask("/test_connection", method="GET") == (200, "success")


@pytest.mark.parametrize(
    ("path", "body", "word"),
    [
        ("/get_worker_address", {}, "model"),
        ("/get_worker_address", {"model": 7}, "model"),
        ("/receive_heart_beat", {"worker_name": "http://h:1"}, "queue_length"),
        ("/register_worker", {}, "worker_name"),
        ("/register_worker", {**REGISTRATION, "worker_name": "file:///etc/passwd"}, "worker_name"),
        ("/register_worker", {**REGISTRATION, "check_heart_beat": "yes"}, "check_heart_beat"),
        ("/register_worker", {**REGISTRATION, "multimodal": True}, "multimodal"),
        ("/register_worker", {**REGISTRATION, "worker_status": None}, "model_names"),
        ("/register_worker", {**REGISTRATION, "worker_status": {"model_names": []}}, "model_names"),
        ("/register_worker", {**REGISTRATION, "worker_status": {**STATUS, "speed": 2}}, "speed"),
        ("/register_worker", {**REGISTRATION, "worker_status": {**STATUS, "queue_length": -1}}, "queue_length"),
        ("/register_worker", [], "object"),
    ],
)
def test_bad_body_is_a_400_that_names_the_field(ask, path, body, word):
    """FastChat answered 500."""
    status, answer = ask(path, body)
    assert status == 400
    assert word in answer["error"]["message"]


@pytest.mark.parametrize("token", [None, "wrong-token", TOKEN + "x", TOKEN[:-1], "' OR 1=1--"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/register_worker"),
        ("POST", "/receive_heart_beat"),
        ("POST", "/list_models"),
        ("GET", "/cluster/watch"),
        ("GET", "/cluster/usage"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/livez/"),
        ("GET", "//livez"),
        ("HEAD", "/test_connection"),
        ("OPTIONS", "/list_models"),
        ("GET", "/no-such-route"),
    ],
)
def test_nothing_answers_without_the_token(ask, method, path, token):
    """Known route or not, whatever the method."""
    assert ask(path, method=method, token=token)[0] == 401


@pytest.mark.parametrize("token", [None, "wrong-token"])
def test_control_connection_without_the_token_is_a_401(controller, token):
    """The WebSocket handshake is refused before anything is read."""
    connection = http.client.HTTPConnection("127.0.0.1", controller.port, timeout=10)
    headers = {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request("GET", "/cluster/connect", headers=headers)
    assert connection.getresponse().status == 401
    connection.close()


def test_health_needs_no_token(ask):
    """For probes."""
    for path in ("/livez", "/health"):
        assert ask(path, method="GET", token=None) == (200, {"status": "ok"})


def test_metrics_and_usage_answer_with_the_token(ask):
    """Prometheus' text, and totals."""
    assert 'fastchat_workers{state="ready"}' in ask("/metrics", method="GET")[1]
    assert ask("/cluster/usage", method="GET") == (200, {"totals": []})


def test_log_never_shows_a_token(controller, ask):
    """Neither the right one nor a wrong one, in headers or in the query."""
    ask("/list_models")
    ask(f"/list_models?token={TOKEN}", token="a-wrong-token-of-somebody")
    controller.wait_for_line("path=/list_models status=401")
    assert TOKEN not in controller.log
    assert "a-wrong-token-of-somebody" not in controller.log
