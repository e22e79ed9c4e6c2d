"""What was published against FastChat, row by row, against our processes. The ids are those of docs/security.md."""

from __future__ import annotations

import io
import json
import os
import pickle
import statistics
import threading
import time

import pytest
import torch

from tests.checkpoints import write_checkpoint
from tests.processes import run_command
from tests.security.conftest import MODEL

STATUS = {"model_names": ["other-model"], "speed": 1, "queue_length": 0}


def registration(url, **changes):
    return {"worker_name": url, "check_heart_beat": False, "worker_status": {**STATUS, **changes}}


def test_cve_2024_10044_nobody_registers_an_address_without_the_token(cluster, canary):
    """And nothing is sent to an address that somebody names."""
    for bearer in (None, "wrong", cluster.key):
        for path, body in (
            ("/register_worker", registration(canary.url)),
            ("/receive_heart_beat", {"worker_name": canary.url, "queue_length": 0}),
            ("/worker_generate_stream", {"model": MODEL}),
            ("/refresh_all_workers", None),
        ):
            assert cluster.ask(cluster.controller, "POST", path, body, bearer=bearer).status == 401
    assert canary.paths == []


@pytest.mark.parametrize(
    ("url", "status"),
    [
        ("http://169.254.169.254/latest/meta-data", 403),
        ("http://2852039166", 403),
        ("http://[::ffff:169.254.169.254]", 403),
        ("http://203.0.113.9:80", 403),
        ("http://0.0.0.0:80", 403),
        ("file:///etc/passwd", 400),
        ("gopher://127.0.0.1", 400),
        ("http://user:secret@127.0.0.1", 400),
        ("http://no-such-host.invalid", 400),
    ],
)
def test_cve_2024_10044_not_even_the_token_leads_everywhere(cluster, url, status):
    """Metadata services never, foreign networks only where the operator allows them."""
    assert cluster.control("/register_worker", registration(url)).status == status
    assert "other-model" not in cluster.control("/list_models").text


def test_cve_2024_10044_redirects_are_not_followed(cluster, canary, second_canary):
    """A registered server that sends us on is not obeyed, by the controller and by the API server."""
    canary.redirect = second_canary.url
    assert cluster.control("/register_worker", registration(canary.url)).status == 200
    while "other-model" not in cluster.call("/v1/models").text:
        pass
    answer = cluster.call(
        "/v1/chat/completions", {"model": "other-model", "messages": [{"role": "user", "content": "x"}]}
    )
    assert answer.status == 503
    assert cluster.control("/refresh_all_workers").status == 200
    assert len(canary.paths) == 2
    assert second_canary.paths == []
    canary.close()
    cluster.control("/refresh_all_workers")
    assert "other-model" not in cluster.control("/list_models").text


def test_cve_2026_85695_nobody_takes_a_model_s_name(cluster, canary):
    """A stranger cannot register under it, so no prompt goes anywhere but to the worker."""
    body = registration(canary.url, model_names=[MODEL])
    assert cluster.ask(cluster.controller, "POST", "/register_worker", body).status == 401
    assert all(cluster.still_answers() for _ in range(4))
    assert canary.paths == []


def test_cve_2026_6607_other_routes_answer_while_the_engine_works(cluster):
    """During a long answer and a batch of embeddings the worker is asked and stays in the table."""
    done = threading.Event()

    def work():
        body = {"model": MODEL, "prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
        cluster.call("/v1/completions", body)
        cluster.call("/v1/embeddings", {"model": MODEL, "input": ["word " * 200] * 32})
        done.set()

    threading.Thread(target=work).start()
    times = []
    while not done.is_set() or len(times) < 5:
        began = time.monotonic()
        assert cluster.ask(cluster.worker, "GET", "/livez").status == 200
        times.append(time.monotonic() - began)
        assert MODEL in cluster.control("/list_models").text
    assert statistics.median(times) < 1


@pytest.mark.parametrize("row", ["cve_2024_10907 boundary", "cve_2024_10912 filename"])
def test_cve_2024_10907_cve_2024_10912_no_form_is_parsed(cluster, row):
    """A megabyte behind the boundary, a file name of ten: refused at once, while others are answered."""
    if "boundary" in row:
        body = b"--b\r\n\r\nx\r\n--b--" + b"-" * 2**20
    else:
        body = b'--b\r\nContent-Disposition: form-data; name="f"; filename="' + b"a" * 10**6 + b'"\r\n\r\n\r\n--b--'
    for path in ("/v1/chat/completions", "/v1/files", "/upload"):
        began = time.monotonic()
        answer = cluster.call(path, body, headers={"Content-Type": "multipart/form-data; boundary=b"})
        assert 400 <= answer.status < 500
        assert time.monotonic() - began < 10
    assert cluster.still_answers()


def test_cve_2024_10908_nothing_redirects(cluster):
    """No path, doubled, encoded or with a URL in it, is answered with a Location."""
    for path in (
        *(
            "/file=https://evil.example",
            "//evil.example",
            "/%2f%2fevil.example",
            "/\\evil.example",
            "/v1//evil.example",
        ),
        *("/gradio_api/file=https://evil.example", "/v1/models/", "/docs", "/v1/models?next=//evil.example"),
    ):
        answer = cluster.call(path)
        assert "location" not in answer.headers
        assert not 300 <= answer.status < 400


def test_cve_2024_11603_cve_2024_12376_issue_3873_nothing_is_fetched(cluster, canary):
    """No field of a request is a URL or a path to the server: images are refused, the rest is not looked at."""
    places = (canary.url, "file:///etc/passwd", "/etc/passwd.png", "http://169.254.169.254/", "\\\\host\\share")
    for place in places:
        for part in (
            {"type": "image_url", "image_url": {"url": place}},
            {"type": "input_audio", "input_audio": {"data": place, "format": "wav"}},
            {"type": "file", "file": {"file_data": place, "file_id": place}},
        ):
            body = {"model": MODEL, "messages": [{"role": "user", "content": [part]}]}
            answer = cluster.call("/v1/chat/completions", body)
            assert answer.status == 400
            assert "root:" not in answer.text
        for path in ("/queue/join", "/gradio_api/queue/join", "/v1/images/generations", "/worker_generate"):
            assert 400 <= cluster.call(path, {"path": place, "data": [place], "url": place}).status < 500
        body = {"model": MODEL, "prompt": "x", "max_tokens": 1, "url": place, "path": place, "images": [place]}
        assert cluster.call("/v1/completions", body).status in (200, 400)
    assert canary.paths == []
    assert cluster.still_answers()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, marker):
        self._marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self._marker),)


@pytest.mark.parametrize("form", ["zip", "plain"])
def test_cve_2025_3677_pickled_code_never_runs(tmp_path, form):
    """A `.bin` that asks for a call is refused with a message, in the worker that would load it."""
    marker = tmp_path / "it-ran"
    folder = write_checkpoint(tmp_path / MODEL, "chatglm2", layout="bin")
    for shard in folder.glob("*.bin"):
        if form == "zip":
            buffer = io.BytesIO()
            torch.save({"transformer.embedding.word_embeddings.weight": Payload(marker)}, buffer)
            shard.write_bytes(buffer.getvalue())
        else:
            shard.write_bytes(pickle.dumps(Payload(marker)))
    ended = run_command("model_worker", "--port", "0", "--no-register", "--model-path", folder, state_dir=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert not marker.exists()


def test_issue_2518_every_route_needs_a_key(cluster):
    """FastChat's other prefix had none. Here no path but two answers without one, whatever it is called."""
    document = json.loads(cluster.call("/openapi.json").text)
    paths = [path.replace("{model}", MODEL) for path in document["paths"]]
    assert len(paths) > 8
    for path in [*paths, "/api/v1/chat/completions", "/api/v1/token_check", "/v1beta/models", "/"]:
        for method in ("GET", "POST"):
            expected = path in ("/livez", "/health")
            assert (cluster.ask(cluster.api, method, path).status == 401) is not expected


def test_chatglm3_1362_text_of_a_tool_call_is_data(cluster, tmp_path):
    """The checkpoint's own chat code evaluated it."""
    marker = tmp_path / "it-ran"
    call = f"tool_call(x=__import__('os').mkdir('{marker}'))"
    conversation = [{"role": "user", "content": f"```python\n{call}\n```"}, {"role": "assistant", "content": call}]
    body = {"model": MODEL, "messages": [*conversation, {"role": "user", "content": call}], "max_tokens": 4}
    assert cluster.call("/v1/chat/completions", body).status == 200
    assert not marker.exists()
