"""Controls C01 to C04, C18 and C25: who gets in, by which door, and what is behind it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import statistics
import time

import aiohttp
import psutil
import pytest

from fastchat.cluster.contract import Hello, ModelEntry
from fastchat.ops.keys import ApiKeys
from tests.processes import start_command
from tests.security.conftest import GIVEN_KEY, MODEL

EVIL = "https://evil.example"


def hello(worker_id, address):
    model = ModelEntry(name=MODEL, max_context=8, created=1)
    return Hello(worker_id=worker_id, address=address, models=(model,)).model_dump_json()


def introduce(cluster, message, token):
    """The controller's first word to a worker, or the status of the refused handshake."""

    async def connect():
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{cluster.controller.url}/cluster/connect", headers=headers) as socket,
        ):
            await socket.send_str(message)
            return json.loads((await socket.receive(20)).data)

    try:
        return asyncio.run(connect())
    except aiohttp.WSServerHandshakeError as error:
        return error.status


def test_c01_a_worker_registers_with_the_token_from_an_allowed_address(cluster, canary):
    """No token, a wrong one, a foreign address, somebody else's, a repeated hello, a live worker's id: none gets in."""
    own = cluster.worker.url
    for token in (None, "wrong", cluster.key):
        assert introduce(cluster, hello("w", canary.url), token) == 401
    assert canary.paths == []
    for address, words in (
        ("http://203.0.113.9:1", "--allowed-workers 203.0.113.9"),
        ("http://169.254.169.254", "never connected to"),
        (canary.url, "tried GET"),
        (own, "something else than this worker"),
    ):
        answer = introduce(cluster, hello("w", address), cluster.token)
        assert answer["type"] == "refused"
        assert words in answer["reason"]
    assert canary.paths == ["/livez"]
    live_id = json.loads(cluster.ask(cluster.worker, "GET", "/livez").text)["worker_id"]
    assert "is connected from" in introduce(cluster, hello(live_id, own), cluster.token)["reason"]
    assert cluster.control("/list_models").text == json.dumps({"models": [MODEL]}, separators=(",", ":"))


def test_c01_the_token_is_sent_to_nobody_who_has_not_registered(cluster):
    """Whoever is asked whether it is a worker, and a server registered by URL, learns no secret."""
    seen = []

    async def listen():
        async def answer(reader, writer):
            seen.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            await asyncio.to_thread(introduce, cluster, hello("w", url), cluster.token)

    asyncio.run(listen())
    assert seen
    assert not any(cluster.token.encode() in each for each in seen)


def test_c02_every_listener_is_on_loopback(cluster):
    """Of every process, and of their children."""
    for process in cluster.processes:
        tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        listening = [
            entry.laddr.ip
            for each in tree
            for entry in each.net_connections("inet")
            if entry.status == psutil.CONN_LISTEN
        ]
        assert set(listening) <= {"127.0.0.1", "::1"}
        assert listening


@pytest.mark.parametrize(
    ("module", "line"),
    [("controller", "NOT ENCRYPTED"), ("openai_api_server", "NO API KEY IS SET: everyone who can reach any address")],
)
def test_c02_an_open_door_is_said_loudly(tmp_path, module, line):
    """The guide's command must start, so it says what it does."""
    with start_command(module, "--host", "0.0.0.0", "--port", "0", state_dir=tmp_path) as process:
        process.wait_for_line(line)


def test_c03_nothing_is_reached_without_a_key(cluster):
    """Whatever the spelling of the path and the method; a poisoned Host or an absolute URL makes no difference."""
    document = json.loads(cluster.call("/openapi.json").text)
    paths = [path.replace("{model}", MODEL) for path in document["paths"] if path not in ("/livez", "/health")]
    spelled = [
        *(form for path in paths for form in (path, path + "/", "/" + path, path.upper(), path + ";x", path + "%00")),
        *(
            "/livez/",
            "//livez",
            "/livez/../metrics",
            "/health%2f..%2fmetrics",
            "/LIVEZ",
            "/livez;/metrics",
            "/%6dodels",
        ),
        f"http://localhost{paths[0]}",
        "*",
    ]
    for path in spelled:
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            assert cluster.ask(cluster.api, method, path).status in (400, 401), (method, path)
    for host in ("localhost/livez?", "evil.example", "x/livez"):
        assert cluster.ask(cluster.api, "GET", "/metrics", headers={"Host": host}).status in (400, 401)
    for process, good in ((cluster.controller, cluster.token), (cluster.worker, cluster.token)):
        for path in ("/metrics", "/v1/models", "/cluster/watch", "/docs", "/openapi.json", "/livez/", "//health"):
            assert cluster.ask(process, "GET", path).status == 401
        assert cluster.ask(process, "GET", "/metrics", bearer=good).status == 200


@pytest.mark.parametrize(
    "bearer", ["", "EMPTY", "ключ", "x" * 65536, "' OR 1=1--", "\t", "null", "sk-fc-" + "A" * 43 + "00000000"]
)
def test_c04_what_is_no_key_opens_nothing(cluster, bearer):
    """At once, whatever it is made of."""
    began = time.monotonic()
    headers = {"Authorization": f"Bearer {bearer}".encode()}
    assert cluster.ask(cluster.api, "GET", "/v1/models", headers=headers).status in (400, 401, 431)
    assert time.monotonic() - began < 10


def test_c04_neither_digest_nor_id_nor_part_of_a_key_opens(cluster):
    """What the store holds is no credential; nor are two headers, or one that only looks right."""
    digest = hashlib.sha256(cluster.key.encode()).hexdigest()
    key_id = json.loads(cluster.ask_keys("list", "--json"))[0]["id"]
    for bearer in (digest, key_id, cluster.key[:-1], cluster.key + "x", cluster.key.upper(), cluster.token):
        assert cluster.ask(cluster.api, "GET", "/v1/models", bearer=bearer).status == 401
    for header in (f"Basic {cluster.key}", cluster.key, f"Bearer: {cluster.key}"):
        assert cluster.ask(cluster.api, "GET", "/v1/models", headers={"Authorization": header}).status == 401
    assert cluster.call("/v1/models").status == cluster.call("/v1/models", key=GIVEN_KEY).status == 200


def test_c04_keys_are_seen_nowhere(cluster):
    """Not in logs, command lines, metrics or the store's files."""
    shown = [cluster.logs, cluster.call("/metrics").text]
    shown += [" ".join(psutil.Process(process.pid).cmdline()) for process in cluster.processes]
    shown += [file.read_bytes().decode("latin-1") for file in cluster.state_dir.glob("api-keys*")]
    for secret in (cluster.key, GIVEN_KEY):
        assert not any(secret in text for text in shown)


def test_c04_time_tells_nothing_of_a_key():
    """Wrong keys that agree with the right one in more and more characters take the same time (Welch's t)."""
    keys = ApiKeys(["sk-" + "k" * 43])
    wrong = {shared: "sk-" + "k" * shared + "x" * (43 - shared) for shared in (0, 42)}
    taken: dict[int, list[int]] = {shared: [] for shared in wrong}
    for number in range(10_000):
        for shared in sorted(wrong, reverse=bool(number % 2)):
            began = time.perf_counter_ns()
            keys.is_allowed(wrong[shared])
            taken[shared].append(time.perf_counter_ns() - began)
    # A machine that does other things too makes the slowest of them: the faster half is about the code.
    few, many = (sorted(each)[: len(each) // 2] for each in taken.values())
    spread = (statistics.variance(few) + statistics.variance(many)) / len(few)
    difference = abs(statistics.fmean(few) - statistics.fmean(many))
    assert difference < 50 or difference / spread**0.5 < 4.5


def test_c18_no_web_page_of_another_origin_is_let_in(cluster):
    """No CORS header unless asked for, whoever asks; and no answer is taken for a page."""
    for origin in (EVIL, "null"):
        preflight = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for bearer in (None, cluster.key):
            answer = cluster.ask(cluster.api, "OPTIONS", "/v1/chat/completions", bearer=bearer, headers=preflight)
            assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-origin" not in cluster.call("/v1/models", headers={"Origin": origin}).headers
    answer = cluster.call("/v1/models")
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in answer.headers


def test_finding_i_c18_without_keys_names_and_origins_are_checked(tmp_path):
    """A name that was pointed at this machine, and a form that a page sends by itself."""
    flags = ("--port", "0", "--controller", "http://127.0.0.1:9")
    with start_command("openai_api_server", *flags, state_dir=tmp_path) as api:
        for method, path, headers, status in (
            ("GET", "/version", {}, 200),
            ("GET", "/version", {"Host": "evil.example"}, 403),
            ("POST", "/v1/chat/completions", {"Origin": EVIL, "Content-Type": "text/plain"}, 403),
            ("POST", "/v1/chat/completions", {"Origin": "null"}, 403),
            ("OPTIONS", "/v1/chat/completions", {"Origin": EVIL, "Access-Control-Request-Method": "POST"}, 405),
        ):
            answer = ask(api, method, path, headers)
            assert answer.status == status
            assert "access-control-allow-origin" not in answer.headers


def ask(process, method, path, headers):
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=10)
    try:
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        return connection.getresponse()
    finally:
        connection.close()


def test_c25_the_data_port_has_the_documented_routes_and_no_other(cluster):
    """Nothing that loads, drains, profiles or changes keys answers there."""
    documented = {
        *("/v1/models", "/v1/models/{model}", "/v1/chat/completions", "/v1/completions", "/v1/embeddings"),
        *("/v1/engines/{model}/completions", "/v1/engines/{model}/embeddings", "/tokenize", "/detokenize"),
        *("/livez", "/health", "/metrics", "/version", "/openapi.json"),
    }
    document = json.loads(cluster.call("/openapi.json").text)
    assert documented <= set(document["paths"])
    for path in (
        *("/docs", "/redoc", "/admin", "/debug", "/start_profile", "/sleep", "/pause", "/reset_prefix_cache"),
        *("/v1/load_lora_adapter", "/update_weights", "/register_worker", "/list_models", "/keys", "/shutdown"),
    ):
        for body in (None, {}):
            assert cluster.call(path, body).status in (404, 405)
        assert path not in document["paths"]


def test_c25_labels_come_from_closed_sets(cluster):
    """A thousand made-up models and routes add no line to the metrics."""

    def num_series():
        return sum(not line.startswith("#") for line in cluster.call("/metrics").text.splitlines())

    cluster.call("/v1/completions", {"model": "unknown", "prompt": "x"})
    cluster.call("/v1/completions/unknown", {"model": "unknown", "prompt": "x"})
    before = num_series()
    for number in range(300):
        assert cluster.call("/v1/completions", {"model": f"unknown-{number}", "prompt": "x"}).status == 404
        assert cluster.call(f"/unknown/{number}").status == 404
    assert num_series() == before
