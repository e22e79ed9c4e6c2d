"""A real API server and controller around canned workers: what reaches the worker, what reaches the client."""

import asyncio
import time
from contextlib import ExitStack
from io import BytesIO

import aiohttp
import openai
import orjson
import pytest

from tests.gateway.canned_worker import WORDS, CannedWorker
from tests.gateway.conftest import TOKEN
from tests.gateway.questions import CHAT, QUESTION, data_of, error_of


def test_the_clients_bytes_reach_the_worker_unchanged(cluster, api, worker):
    """White space, key order and unknown fields included."""
    body = b'{ "messages": [{"role":"user","content":"\\u4f60"}],  "zzz": 1.50, "model":"tiny"}'

    async def post():
        async with cluster.session.post(api + CHAT, data=body) as response:
            return response.status

    assert cluster.thread.run(post()) == 200
    assert worker.received[-1].body == body


def test_a_large_body_is_relayed_whole(cluster, api, worker):
    body = orjson.dumps(QUESTION | {"filler": "x" * 3 * 2**20})
    assert cluster.get(api, CHAT, "POST", data=BytesIO(body))[0] == 200
    assert worker.received[-1].body == body


def test_the_worker_gets_our_headers_and_none_of_the_clients(cluster, api, worker):
    """The contract's headers are made here; the client's key and forged headers stay here."""
    forged = {
        "Authorization": "Bearer sk-client",
        "x-fastchat-request-id": "forged",
        "x-fastchat-tenant": "forged",
        "x-fastchat-priority": "-9",
        "x-fastchat-resume": "1",
        "x-request-id": "forged",
        "x-api-key": "sk-client",
        "User-Agent": "OpenAI/v1 PythonBindings/0.28.1",
    }
    began = int(time.time())
    _, headers, body = cluster.post(api, CHAT, QUESTION, headers=forged)
    got = worker.received[-1].headers
    assert got["authorization"] == f"Bearer {TOKEN}"
    assert got["user-agent"] == "OpenAI/v1 PythonBindings/0.28.1"
    assert got["x-fastchat-request-id"] == headers["x-request-id"] != "forged"
    assert orjson.loads(body)["id"] == f"chatcmpl-{headers['x-request-id']}"
    assert began <= int(got["x-fastchat-created"]) <= time.time()
    assert 0 <= int(got["x-fastchat-seed"]) < 2**63
    assert not {"x-fastchat-tenant", "x-fastchat-priority", "x-fastchat-resume", "x-fastchat-tags"} & got.keys()
    assert "forged" not in str(worker.received[-1].raw_headers)
    assert "sk-client" not in str(worker.received[-1].raw_headers)


def test_tags_are_asked_for_and_stripped(cluster, api, worker):
    """A client sees events and keep-alives, and no tag."""
    status, headers, body = cluster.post(api, CHAT, QUESTION | {"stream": True})
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert worker.received[-1].headers["x-fastchat-tags"] == "1"
    assert body.startswith(b": keep-alive\n\ndata: {")
    assert b"\n: 0" not in body
    assert b"prompt" not in body
    chunks = data_of(body)
    assert chunks[-1] == b"[DONE]"
    contents = [orjson.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks[:-1]]
    assert tuple(contents) == WORDS


def test_the_official_client_reads_it_all(cluster, api, worker):
    with openai.OpenAI(base_url=f"{api}/v1", api_key="EMPTY", max_retries=0) as client:
        messages = [{"role": "user", "content": "hi"}]
        answer = client.chat.completions.create(model="tiny", messages=messages)
        assert answer.choices[0].message.content == "".join(WORDS)
        chunks = list(client.chat.completions.create(model="tiny", messages=messages, stream=True))
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "".join(WORDS)
        assert len({chunk.id for chunk in chunks}) == 1
        assert client.completions.create(model="tiny", prompt="a").choices[0].text == "".join(WORDS)
        assert client.embeddings.create(model="tiny", input="a").data[0].embedding == [0.6, 0.8]
        assert [model.id for model in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").owned_by == "fastchat"
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model="vicuna-7b-v1.3", messages=messages)
        assert caught.value.code == "model_not_found"
        assert "`vicuna-7b-v1.3`" in caught.value.message
        assert "`tiny`" in caught.value.message
        assert caught.value.request_id


@pytest.mark.parametrize("act", ["hang", "hang_in_stream"])
def test_a_worker_hears_at_once_that_the_client_left(cluster, api, worker, act):
    """Streaming or not: at once the worker's side of the connection is closed (a busy machine may take its time)."""

    async def ask_and_leave():
        document = QUESTION | {"act": act, "stream": act == "hang_in_stream"}
        async with aiohttp.ClientSession() as session:
            call = session.post(api + CHAT, json=document)
            if act == "hang":
                asking = cluster.thread.loop.create_task(call.__aenter__())
                received = await worker.wait_for_request()
                await received.began.wait()
                left_at = time.monotonic()
                asking.cancel()
            else:
                response = await call
                await response.content.readany()
                received = await worker.wait_for_request()
                await received.began.wait()
                left_at = time.monotonic()
                response.close()
            await received.left.wait()
        return received.left_at - left_at

    assert cluster.thread.run(ask_and_leave()) < 10


@pytest.mark.parametrize(
    ("act", "code"),
    [
        ("die_in_stream", "worker_lost"),
        ("shut_down_in_stream", "shutting_down"),
        ("cut_stream", "bad_worker_answer"),
        ("endless_line", "bad_worker_answer"),
        ("blank_lines", "bad_worker_answer"),
    ],
)
def test_a_broken_stream_ends_with_an_error_event(cluster, api, worker, act, code):
    """Nothing is made up: no finish reason, no [DONE]; what came before stays."""
    status, _, body = cluster.post(api, CHAT, QUESTION | {"stream": True, "act": act})
    assert status == 200
    chunks = data_of(body.replace(b"\n\n\n\n", b""))
    assert orjson.loads(chunks[0])["choices"][0]["delta"]["content"] == WORDS[0]
    assert orjson.loads(chunks[-1])["error"]["code"] == code
    assert b"[DONE]" not in body
    assert b'"finish_reason":"' not in body


def test_the_official_client_raises_where_a_stream_breaks(api, worker):
    with openai.OpenAI(base_url=f"{api}/v1", api_key="EMPTY", max_retries=0) as client:
        stream = client.chat.completions.create(
            model="tiny", messages=QUESTION["messages"], stream=True, extra_body={"act": "die_in_stream"}
        )
        with pytest.raises(openai.APIError, match="lost"):
            list(stream)


@pytest.mark.parametrize("first", ["refuse", "die", "page", "wants_key", "redirect", "unknown"])
@pytest.mark.parametrize("stream", [False, True])
def test_another_worker_is_asked_while_nothing_was_sent(cluster, api, first, stream):
    """A worker that drains, dies, talks nonsense or has just lost the model costs the client nothing."""
    with cluster.worker("bad", tiny=first) as bad:
        cluster.wait_for_models(api, "tiny")
        bad.received.clear()
        with cluster.worker("good", ("tiny", "other")) as good:
            cluster.wait_for_models(api, "other", "tiny")
            for _ in range(2):  # both are idle: whichever is chosen first, the other is next
                status, _, body = cluster.post(api, CHAT, QUESTION | {"stream": stream})
                assert status == 200
                assert (data_of(body)[-1] == b"[DONE]") if stream else orjson.loads(body)["choices"]
            assert bad.received
            assert len(good.received) == 2
    cluster.wait_for_models(api)


def test_an_unreachable_worker_is_passed_over(cluster, api):
    """Its connections are refused although it is in the table."""
    deaf = CannedWorker("deaf")
    with ExitStack() as registered:
        with cluster.thread.serve(deaf.app) as address:
            registered.enter_context(cluster.in_loop(deaf.registered(cluster.controller_url, TOKEN, address)))
        with cluster.worker("good", ("tiny", "other")):
            cluster.wait_for_models(api, "other", "tiny")
            assert [cluster.post(api, CHAT, QUESTION)[0] for _ in range(2)] == [200, 200]
        cluster.wait_for_models(api, "tiny")
        status, _, body = cluster.post(api, CHAT, QUESTION)
        assert (status, error_of(body)["code"]) == (503, "worker_unreachable")
    cluster.wait_for_models(api)


def test_a_refusal_of_all_workers_is_a_503_with_the_workers_word(cluster, api, worker):
    status, headers, body = cluster.post(api, CHAT, QUESTION | {"act": "refuse"})
    assert (status, headers["retry-after"]) == (503, "7")
    assert error_of(body) == {"message": "draining", "type": "server_error", "param": None, "code": "draining"}


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        ("conflict", 400, None),
        ("unknown", 404, "model_not_found"),
        ("wants_key", 503, "worker_refused"),
        ("page", 503, "bad_worker_answer"),
        ("redirect", 503, "bad_worker_answer"),
        ("die", 503, "worker_lost"),
    ],
)
def test_no_foreign_status_or_text_reaches_a_client(cluster, api, worker, act, status, code):
    """Never 409 or 422, no page of a proxy, no redirect, no 401 for a key that is ours."""
    got, headers, body = cluster.post(api, CHAT, QUESTION | {"act": act})
    assert (got, error_of(body)["code"]) == (status, code)
    assert b"/usr/" not in body
    if status == 503:
        assert 1 <= int(headers["retry-after"]) <= 120


@pytest.mark.parametrize(("act", "stream"), [("whole", True), ("stream", False)])
def test_what_was_not_asked_for_reaches_no_client(cluster, api, worker, act, stream):
    """A whole answer would be an empty stream to its reader, and events are no JSON."""
    status, _, body = cluster.post(api, CHAT, QUESTION | {"act": act, "stream": stream})
    assert (status, error_of(body)["code"]) == (503, "bad_worker_answer")


def test_stream_means_nothing_where_nothing_is_streamed(cluster, api, worker):
    asked = {"model": "tiny", "input": "a", "stream": True, "act": "whole"}
    assert cluster.post(api, "/v1/embeddings", asked)[0] == 200


def test_a_workers_own_error_passes_with_its_headers(cluster, api, worker):
    status, headers, body = cluster.post(api, CHAT, QUESTION | {"act": "bad_value", "stream": True})
    assert (status, headers["x-fastchat-ignored"]) == (400, "frobnicate")
    assert error_of(body)["param"] == "top_p"


def test_a_slow_reader_stops_its_worker_and_nothing_piles_up(cluster, api, worker):
    """What is under way is bounded by the sockets' buffers; others are served meanwhile."""

    async def read_nothing():
        async with cluster.session.post(api + CHAT, json=QUESTION | {"stream": True, "act": "fast_stream"}) as response:
            received = await worker.wait_for_request()
            before = -1
            async with asyncio.timeout(50):
                while received.num_bytes_written != before or before < 1:
                    before = received.num_bytes_written
                    await asyncio.sleep(0.2)
            async with cluster.session.post(api + CHAT, json=QUESTION) as other:
                assert other.status == 200
            response.close()
            await received.left.wait()
            return before

    assert 0 < cluster.thread.run(read_nothing()) < 32 * 2**20


def test_a_request_for_an_engine_of_the_url_names_it_in_the_body(cluster, api):
    """openai 0.28 with `engine=`, and a model with a slash in its name."""
    with cluster.worker(models=("org/tiny",)) as worker:
        cluster.wait_for_models(api, "org/tiny")
        status, _, body = cluster.post(api, "/v1/engines/org/tiny/completions", {"prompt": "a"})
        assert status == 200
        assert orjson.loads(body)["object"] == "text_completion"
        assert orjson.loads(worker.received[-1].body) == {"prompt": "a", "model": "org/tiny"}
        status, _, _ = cluster.post(api, "/v1/engines/org/tiny/embeddings", {"input": "a"})
        assert (status, worker.received[-1].path) == (200, "/v1/embeddings")
        status, _, body = cluster.post(api, "/v1/engines/org/tiny/completions", {"prompt": "a", "model": "b"})
        assert (status, error_of(body)["param"]) == (400, "model")
    cluster.wait_for_models(api)


def test_tokenize_needs_no_model_while_only_one_is_served(cluster, api, worker):
    assert cluster.post(api, "/tokenize", {"prompt": "a"})[0] == 200
    assert orjson.loads(worker.received[-1].body)["model"] == "tiny"
    assert cluster.post(api, "/detokenize", {"tokens": [1]})[0] == 200
    with cluster.worker("w2", ("other",)):
        cluster.wait_for_models(api, "other", "tiny")
        status, _, body = cluster.post(api, "/tokenize", {"prompt": "a"})
        assert (status, error_of(body)["code"]) == (400, "missing_model")
    cluster.wait_for_models(api, "tiny")
