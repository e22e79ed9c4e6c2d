"""The API server's own answers: models, health, keys, CORS, and what it says when nobody can answer."""

import asyncio
import re
import time
from io import BytesIO

import orjson
import pytest

from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig, CorsConfig
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from tests.gateway.canned_worker import CREATED, CannedWorker
from tests.gateway.conftest import TOKEN
from tests.processes import free_port

CHAT = "/v1/chat/completions"
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def error_of(body):
    document = orjson.loads(body)
    assert set(document) == {"error"}
    assert set(document["error"]) == {"message", "type", "param", "code"}
    return document["error"]


def test_the_model_list_has_exactly_the_guides_fields(cluster, api):
    with cluster.worker("w1", ("chatglm2-6b", "org/other")), cluster.worker("w2", ("chatglm2-6b",)):
        listed = cluster.wait_for_models(api, "chatglm2-6b", "org/other")
        assert list(listed) == ["object", "data"]
        card = listed["data"][0]
        permission = card["permission"][0]
        assert card == {
            "id": "chatglm2-6b",
            "object": "model",
            "created": CREATED,
            "owned_by": "fastchat",
            "root": "chatglm2-6b",
            "parent": None,
            "permission": [permission],
        }
        assert permission == {
            "id": permission["id"],
            "object": "model_permission",
            "created": CREATED,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": True,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        prefix, _, rest = permission["id"].partition("-")
        assert (prefix, len(rest), rest.isalnum()) == ("modelperm", 22, True)
        status, _, body = cluster.get(api, "/v1/models/org/other")
        assert (status, orjson.loads(body)["id"]) == (200, "org/other")
        status, _, body = cluster.get(api, "/v1/models/nobody")
        assert (status, error_of(body)["code"]) == (404, "model_not_found")
    cluster.wait_for_models(api)


def test_an_unknown_model_is_a_404_that_names_both(cluster, api, worker):
    status, headers, body = cluster.post(api, CHAT, QUESTION | {"model": "vicuna-7b-v1.3"})
    error = error_of(body)
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "`vicuna-7b-v1.3`" in error["message"]
    assert "`tiny`" in error["message"]
    assert headers["x-request-id"]


def test_a_model_whose_last_worker_left_is_unavailable_and_not_unknown(cluster, api):
    with cluster.worker("w1", ("tiny",)):
        cluster.wait_for_models(api, "tiny")
    cluster.wait_for_models(api)
    status, headers, body = cluster.post(api, CHAT, QUESTION)
    assert (status, error_of(body)["code"]) == (503, "no_worker")
    assert 1 <= int(headers["retry-after"]) <= 120


@pytest.mark.parametrize("path", [CHAT, "/v1/models/never-served"])
def test_without_any_worker_no_model_is_unknown(cluster, api, path):
    """Who asks too early hears 503, which clients repeat, and not 404, which they do not."""
    cluster.wait_for_models(api)
    question = QUESTION | {"model": "never-served"}
    status, headers, body = cluster.post(api, path, question) if path == CHAT else cluster.get(api, path)
    assert (status, error_of(body)["code"]) == (503, "no_worker")
    assert "No worker has registered" in error_of(body)["message"]
    assert headers["retry-after"]


def test_a_model_that_left_is_unavailable_while_others_are_served(cluster, api):
    """And one that was never served is unknown."""
    with cluster.worker("w2", ("other",)):
        with cluster.worker("w1", ("tiny",)):
            cluster.wait_for_models(api, "other", "tiny")
        cluster.wait_for_models(api, "other")
        status, headers, body = cluster.post(api, CHAT, QUESTION)
        assert (status, error_of(body)["code"]) == (503, "no_worker")
        assert headers["retry-after"]
        assert cluster.post(api, CHAT, QUESTION | {"model": "never-served"})[0] == 404
    cluster.wait_for_models(api)


def test_a_model_that_is_being_loaded_is_unavailable_and_not_unknown(cluster):
    """While others are served; it is not listed before a worker has it, and once it is there it is served."""
    with cluster.api_server(expected_models=("coming", "tiny")) as url, cluster.worker("w1", ("tiny",)):
        cluster.wait_for_models(url, "tiny")
        question = QUESTION | {"model": "coming"}
        status, headers, body = cluster.post(url, CHAT, question)
        assert (status, error_of(body)["code"]) == (503, "no_worker")
        assert "`coming` is still being loaded" in error_of(body)["message"]
        assert headers["retry-after"]
        assert cluster.get(url, "/v1/models/coming")[0] == 503
        assert cluster.post(url, CHAT, QUESTION | {"model": "never-served"})[0] == 404
        with cluster.worker("w2", ("coming",)):
            cluster.wait_for_models(url, "coming", "tiny")
            assert cluster.post(url, CHAT, question)[0] == 200


def test_a_draining_worker_gets_no_new_request(cluster, api):
    worker = CannedWorker()
    with (
        cluster.thread.serve(worker.app) as address,
        cluster.in_loop(worker.registered(cluster.controller_url, TOKEN, address)) as connection,
    ):
        cluster.wait_for_models(api, "tiny")
        assert cluster.get(api, "/health")[0] == 200
        cluster.thread.loop.call_soon_threadsafe(connection.drain)
        cluster.thread.run(until_status(cluster, f"{api}/health", 503))
        status, _, body = cluster.post(api, CHAT, QUESTION)
        assert (status, error_of(body)["code"]) == (503, "no_worker")
        assert not worker.received
    cluster.wait_for_models(api)


def test_health_is_about_workers_and_livez_about_the_process(cluster, api):
    assert cluster.get(api, "/livez")[0] == 200
    status, headers, body = cluster.get(api, "/health")
    assert (status, error_of(body)["code"]) == (503, "no_worker")
    assert headers["retry-after"]
    with cluster.worker():
        cluster.wait_for_models(api, "tiny")
        assert orjson.loads(cluster.get(api, "/health")[2])["status"] == "ready"
    cluster.wait_for_models(api)


def test_without_a_controller_it_says_for_whom_it_waits(cluster):
    config = ApiServerConfig(cluster_token=TOKEN, controller_address=f"http://localhost:{free_port()}")
    with cluster.thread.serve(create_api_app(config)) as url:
        for status, headers, body in (cluster.post(url, CHAT, QUESTION), cluster.get(url, "/v1/models")):
            assert (status, error_of(body)["code"]) == (503, "no_controller")
            assert config.controller_address in error_of(body)["message"]
            assert headers["retry-after"]
        assert cluster.get(url, "/livez")[0] == 200


def test_a_restart_of_the_controller_disturbs_nothing_under_way(cluster):
    """Started after the API server, killed and started again: the same stream goes on, the table is back."""
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    worker = CannedWorker()

    def serve_controller():
        app = create_controller_app(ControllerConfig(cluster_token=TOKEN))
        return cluster.thread.serve(app, port, on_stop=app.state.controller.stop)

    async def open_stream(url):
        response = await cluster.session.post(url + CHAT, json=QUESTION | {"stream": True, "act": "hang_in_stream"})
        await response.content.readany()
        return response

    config = ApiServerConfig(cluster_token=TOKEN, controller_address=address)
    with cluster.thread.serve(create_api_app(config)) as url, cluster.thread.serve(worker.app) as worker_address:
        registering = worker.registered(address, TOKEN, worker_address)
        with serve_controller():
            cluster.thread.run(registering.__aenter__())
            cluster.wait_for_models(url, "tiny")
            response = cluster.thread.run(open_stream(url))
        assert cluster.post(url, CHAT, QUESTION)[0] == 200  # with its last table, while the controller is away
        with serve_controller():
            began = time.monotonic()
            cluster.thread.run(until_status(cluster, f"{address}/health", 200))
            cluster.wait_for_models(url, "tiny")
            assert time.monotonic() - began < 20
            assert not worker.received[0].left.is_set()
            cluster.thread.loop.call_soon_threadsafe(response.close)
            cluster.thread.run(worker.received[0].left.wait())
            cluster.thread.run(registering.__aexit__(None, None, None))


KEY = {"Authorization": "Bearer sk-one"}


@pytest.fixture(scope="module")
def locked(cluster):
    """An API server with two keys."""
    with cluster.api_server(api_keys=("sk-one", "sk-two")) as url:
        yield url


def test_with_keys_nothing_but_two_paths_answers_without_one(cluster, locked):
    """Every declared route, with every method, and paths that only look like them: 401, never anything else."""
    app = create_api_app(ApiServerConfig(cluster_token=TOKEN, api_keys=("sk-one",)))
    paths = {re.sub(r"\{\w+:path\}", "tiny", route.path) for route in app.routes}
    assert len(paths) == 23
    odd = ["/", "/v1/models/", "//v1/models", "/v1%2fmodels", "/V1/MODELS", "/v1/models;x", "/livez/", "/health/x"]
    for path in [*sorted(paths - {"/livez", "/health"}), *odd]:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "TRACE"):
            status, headers, body = cluster.get(locked, path, method)
            assert status == 401, (method, path)
            assert headers["x-request-id"]
            assert method == "HEAD" or error_of(body)["code"] == "invalid_api_key"
    for path in ("/livez", "/health"):
        assert cluster.get(locked, path)[0] in (200, 503)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic sk-one", "sk-one", "Bearer sk-onee", "Bearer sk-on", "Bearer sk-one,sk-two"],
)
def test_a_wrong_key_is_refused(cluster, locked, value):
    status, _, body = cluster.get(locked, "/v1/models", headers={"Authorization": value})
    assert (status, error_of(body)["code"]) == (401, "invalid_api_key")


def test_a_key_opens_and_names_a_tenant_but_never_travels(cluster, locked):
    """The worker sees an opaque tenant, the same for one key and another for the other."""
    with cluster.worker() as worker:
        cluster.wait_for_models(locked, "tiny", headers=KEY)
        for key in ("sk-one", "sk-two", "sk-one"):
            assert cluster.post(locked, CHAT, QUESTION, headers={"authorization": f"bearer {key}"})[0] == 200
        one, two, again = (received.headers["x-fastchat-tenant"] for received in worker.received)
        assert one == again != two
        assert "sk-" not in str([received.raw_headers for received in worker.received])
    cluster.wait_for_models(locked, headers=KEY)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'{"model": "tiny"', "invalid_json"),
        (b'{"model": "tiny", "model": "tiny"}', "invalid_json"),
        (b'{"messages": []}', "missing_model"),
        (b'{"model": null}', "missing_model"),
        (b'{"model": 7}', None),
        (b'{"model": ""}', None),
        (b'{"model": "' + b"x" * 10_000 + b'"}', None),
    ],
)
def test_a_body_that_names_no_model_is_a_400(cluster, api, worker, body, code):
    status, _, answer = cluster.get(api, CHAT, "POST", data=body)
    assert (status, error_of(answer)["code"]) == (400, code)
    assert len(answer) < 1000
    assert not worker.received


def test_a_body_that_is_too_large_is_a_413(cluster, api):
    status, _, body = cluster.get(api, CHAT, "POST", data=BytesIO(b"x" * (4 * 2**20 + 1)))
    assert (status, error_of(body)["code"]) == (413, "body_too_large")


def test_cors_is_off_unless_asked_for(cluster, api):
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    _, headers, _ = cluster.get(api, CHAT, "OPTIONS", headers=preflight)
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_cors_answers_a_preflight_without_a_key_and_nothing_else(cluster):
    cors = CorsConfig(allowed_origins=("https://page.example",))
    with cluster.api_server(api_keys=("sk-one",), cors=cors) as url:
        preflight = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        status, headers, _ = cluster.get(url, CHAT, "OPTIONS", headers=preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "https://page.example")
        assert cluster.get(url, CHAT, "OPTIONS", headers=preflight | {"Origin": "https://evil.example"})[0] == 400
        status, headers, _ = cluster.post(url, CHAT, QUESTION, headers={"Origin": "https://page.example"})
        assert (status, headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_operators_can_ask(cluster, api, worker):
    """Version, metrics and the document of all routes."""
    assert cluster.post(api, CHAT, QUESTION)[0] == 200
    assert orjson.loads(cluster.get(api, "/version")[2])["version"]
    metrics = cluster.get(api, "/metrics")[2].decode()
    assert 'model_name="tiny",route="/v1/chat/completions",status="200"' in metrics
    assert 'fastchat_workers{state="ready"} 1.0' in metrics
    document = orjson.loads(cluster.get(api, "/openapi.json")[2])
    assert document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert "messages" in document["components"]["schemas"]["ChatCompletionRequest"]["properties"]
    assert "/v1/engines/{model}/embeddings" in document["paths"]
    status, _, body = cluster.get(api, "/docs")
    assert (status, error_of(body)["code"]) == (404, "route_not_found")
    status, headers, body = cluster.get(api, CHAT)
    assert (status, headers["allow"], error_of(body)["code"]) == (405, "POST", "method_not_allowed")


async def until_status(cluster, url, status):
    while True:
        async with cluster.session.get(url) as response:
            if response.status == status:
                return
        await asyncio.sleep(0.02)
