"""The models' life-cycle in operators' hands: through a real API server, controller and worker."""

import json
import threading
import time
from contextlib import ExitStack, contextmanager

import httpx2
import openai
import orjson
import pytest

from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from fastchat.ops.key_store import KeyStore
from fastchat.serve.columns import table_lines
from tests.processes import free_port, run_command
from tests.worker.conftest import TOKEN, serving, slowed_down, wait_until, worker_config

PATH = "/api/v1/models"
CHAT = {"model": "qwen", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
LONG = {**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}


class System:
    """One worker behind two API servers: one asks for keys, one is open."""

    def __init__(self, thread, table, worker, with_keys, keyless, keys):
        self.thread, self._table = thread, table
        self.worker = worker
        self.url = with_keys
        self.keys = keys
        self._with_keys, self._keyless = with_keys, keyless

    def ask(self, method, path, key="operator", **options):
        headers = {"authorization": f"Bearer {self.keys[key]}", **options.pop("headers", {})}
        return httpx2.request(method, self._with_keys + path, headers=headers, timeout=60, **options)

    def ask_keyless(self, method, path, **options):
        return httpx2.request(method, self._keyless + path, timeout=60, **options)

    def act(self, name, action):
        answer = self.ask("POST", f"{PATH}/{name}/{action}")
        assert answer.status_code == 200, answer.text
        (row,) = answer.json()["data"]
        return row

    def row(self, name):
        (row,) = (row for row in self.ask("GET", PATH).json()["data"] if row["id"] == name)
        return row

    def table_states(self):
        """The models' states as the controller knows them."""
        (entry,) = self._table.snapshot().workers
        return entry.load.states

    def stream(self, body):
        """Begin a stream, read its first event; the rest is read by a thread, which `join` waits for."""
        return Stream(self._with_keys, self.keys["client"], body)


class Stream:
    def __init__(self, url, key, body):
        self.lines = []
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(url, key, body))
        self._thread.start()
        assert self._has_begun.wait(60)

    def _read(self, url, key, body):
        headers = {"authorization": f"Bearer {key}"}
        with httpx2.stream("POST", url + "/v1/chat/completions", json=body, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                self.lines.append(line)
                self._has_begun.set()

    def join(self):
        self._thread.join(60)
        return self.lines


def text_of(lines):
    """What a client has read in the end."""
    chunks = [orjson.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


@pytest.fixture(scope="module")
def system(thread, checkpoints, tmp_path_factory):
    store_path = tmp_path_factory.mktemp("keys") / "keys.sqlite3"
    store = KeyStore(store_path)
    keys = {"given": "sk-given", "unknown": "sk-unknown"}
    for name in ("client", "operator"):
        _, keys[name] = store.create(
            name=name, created_at=int(time.time()), expires_at=None, is_operator=name == "operator"
        )
    store.close()
    app = create_controller_app(ControllerConfig(cluster_token=TOKEN))
    port = free_port()
    with ExitStack() as stack:
        controller_url = stack.enter_context(thread.serve(app, on_stop=app.state.controller.stop))
        config = worker_config(checkpoints, address=f"http://127.0.0.1:{port}", controller_address=controller_url)
        worker = stack.enter_context(serving(thread, config, port=port))
        both = ({"api_keys": ("sk-given",), "key_store_path": store_path}, {})
        configs = (ApiServerConfig(cluster_token=TOKEN, controller_address=controller_url, **each) for each in both)
        urls = [stack.enter_context(thread.serve(create_api_app(each))) for each in configs]
        system = System(thread, app.state.controller.table, worker, *urls, keys)
        wait_until(lambda: system.ask_keyless("GET", "/health").status_code == 200)
        wait_until(lambda: system.ask("GET", "/health").status_code == 200)
        yield system


def test_a_model_s_whole_life(system):
    """Asleep it holds nothing and answers all the same; pinned it stays."""
    awake = system.row("qwen")
    assert (awake["state"], awake["progress"], awake["pinned"]) == ("awake", 1, False)
    assert awake["held_bytes"] == awake["memory_bytes"] > 0
    before = system.ask("POST", "/v1/chat/completions", json=CHAT).json()["choices"]
    assert abs(system.row("qwen")["last_used"] - time.time()) < 30
    asleep = system.act("qwen", "sleep")
    assert (asleep["state"], asleep["held_bytes"], asleep["progress"]) == ("asleep", 0, 0)
    assert system.ask("POST", "/v1/chat/completions", json=CHAT).json()["choices"] == before
    assert system.row("qwen")["state"] == "awake"
    assert system.act("qwen", "unload")["state"] == "asleep"
    assert system.act("qwen", "wake")["state"] == "awake"
    assert system.act("qwen", "unload")["state"] == "asleep"
    pinned = system.act("qwen", "pin")
    assert (pinned["state"], pinned["pinned"]) == ("awake", True)
    refused = system.ask("POST", f"{PATH}/qwen/unload")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "model_pinned")
    assert not system.act("qwen", "unpin")["pinned"]
    assert system.act("qwen", "load")["state"] == "awake"


def test_an_alias_moves_its_model_and_the_others_stay(system):
    """`chatglm2-6b` is served under two names and held once."""
    assert system.row("chatglm2-6b")["aliases"] == ["vicuna-7b-v1.3"]
    assert system.act("vicuna-7b-v1.3", "unload")["id"] == "chatglm2-6b"
    assert system.row("chatglm2-6b")["state"] == "asleep"
    assert system.row("qwen")["state"] == "awake"
    document = system.ask("GET", PATH).json()
    (worker,) = document["workers"]
    assert worker["used_bytes"] == system.row("qwen")["memory_bytes"] < worker["budget_bytes"]
    listed = {card["id"] for card in system.ask("GET", "/v1/models").json()["data"]}
    assert listed == {"chatglm2-6b", "vicuna-7b-v1.3", "qwen"}
    system.act("chatglm2-6b", "load")


def test_unload_during_a_stream_lets_it_end(system):
    """The answer is whole; the model is leaving meanwhile, and then gone."""
    expected = text_of(system.stream(LONG).join())
    with slowed_down(system.worker):
        stream = system.stream(LONG)
        assert system.act("qwen", "unload")["state"] == "leaving"
    lines = stream.join()
    assert lines[-2] == "data: [DONE]"
    assert text_of(lines) == expected
    wait_until(lambda: system.row("qwen")["state"] == "asleep")
    system.worker.wait_until_empty()


def test_a_stream_for_a_sleeping_model_says_what_it_waits_for(system):
    """Comments while another answer holds the memory that it needs; then the same text as ever; SDKs pass over them."""
    expected = text_of(system.stream({**CHAT, "stream": True}).join())
    keeper = system.worker.runtime.control._keeper
    with loads_held_up(system, keeper):
        system.act("qwen", "sleep")
        wait_until(lambda: system.table_states()["qwen"] == "asleep")
        stream = system.stream({**CHAT, "stream": True})
        wait_until(lambda: ": waiting for qwen to be loaded" in stream.lines)
        wait_until(lambda: system.table_states()["qwen"] == "loading")
    lines = stream.join()
    assert text_of(lines) == expected
    assert lines[-2] == "data: [DONE]"
    wait_until(lambda: system.table_states()["qwen"] == "awake")


def test_official_clients_pass_over_the_comments(system):
    """A model that is loaded meanwhile changes nothing in what the library gives."""
    client = openai.OpenAI(base_url=system.url + "/v1", api_key=system.keys["client"], max_retries=0, timeout=60)
    texts = []
    for sleeps in (False, True):
        if sleeps:
            system.act("qwen", "sleep")
        with client.chat.completions.create(**{**CHAT, "stream": True}) as chunks:
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert texts[0] == texts[1] != ""


@contextmanager
def loads_held_up(system, keeper):
    """No load begins while the block lasts: as if the disk were busy with another one."""
    lock = keeper._one_load
    system.thread.run(lock.acquire())
    try:
        yield
    finally:
        system.thread.loop.call_soon_threadsafe(lock.release)


def test_the_command_shows_and_moves_models(system, tmp_path):
    """A table for people, JSON for programs, one line for what cannot be done."""

    def models(*words, key="operator"):
        flags = ("--url", system.url, "--api-key", system.keys[key])
        return run_command("models_command", *words, *flags, state_dir=tmp_path)

    assert "asleep" in models("sleep", "qwen").stdout
    headings, *lines = models("ls").stdout.splitlines()
    assert headings.split() == ["MODEL", "STATE", "MEMORY", "LAST", "USED", "PINNED", "WORKER"]
    assert [line.split()[:2] for line in lines][1] == ["qwen", "asleep"]
    loaded = json.loads(models("load", "qwen", "chatglm2-6b", "--json").stdout)
    assert [row["state"] for row in loaded["data"]] == ["awake", "awake"]
    for words, key, said, code in (
        (("load", "nobody"), "operator", "`nobody` does not exist", 1),
        (("ls",), "client", "no operator's", 1),
        (("ls",), "unknown", "not known here", 1),
    ):
        refused = models(*words, key=key)
        assert refused.returncode == code
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: ")
        assert said in line


def test_tables_are_as_wide_as_a_terminal_shows_them():
    """A Chinese character takes two places."""
    assert list(table_lines([("模型", "b"), ("abcde", "b")])) == ["模型   b", "abcde  b"]


def test_only_operators_move_models(system):
    """A client's key may ask models and no more; no key, no entry; the worker itself asks for the cluster token."""
    expected = {"client": 403, "unknown": 401, "given": 200, "operator": 200}
    for key, status in expected.items():
        assert system.ask("GET", PATH, key).status_code == status
        assert system.ask("POST", f"{PATH}/qwen/load", key).status_code == status
    assert system.ask("GET", PATH, "client").json()["error"]["code"] == "operator_key_needed"
    assert httpx2.get(system.worker.url + PATH).status_code == 401
    assert httpx2.post(f"{system.worker.url}{PATH}/qwen/unload").status_code == 401
    assert system.worker.get(PATH).status_code == 200


def test_without_keys_only_this_machine_moves_models(system):
    """Not through a proxy for others, and not a foreign page in this machine's browser."""
    assert system.ask_keyless("GET", PATH).status_code == 200
    assert system.ask_keyless("POST", f"{PATH}/qwen/load").status_code == 200
    for headers in ({"x-forwarded-for": "192.0.2.1"}, {"origin": "https://evil.example"}):
        answer = system.ask_keyless("POST", f"{PATH}/qwen/unload", headers=headers)
        assert answer.status_code == 403
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert system.row("qwen")["state"] == "awake"


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code"),
    [
        ("POST", "/nobody/load", {}, 404, "model_not_found"),
        ("POST", "/a%2Fb%20c/unload", {}, 404, "model_not_found"),
        ("POST", "/qwen/explode", {}, 404, "route_not_found"),
        ("GET", "/qwen/load", {}, 405, "method_not_allowed"),
        ("POST", "/qwen/load", {"json": {"force": True}}, 400, "unexpected_body"),
        ("POST", "/qwen/load?worker=nobody", {}, 400, None),
        ("POST", "/qwen/load", {"json": {}}, 200, None),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_told_in_openai_s_shape(system, method, path, options, status, code):
    answer = system.ask(method, PATH + path, **options)
    assert answer.status_code == status, answer.text
    if status != 200:
        assert (answer.json()["error"]["code"], set(answer.json()["error"])) == (
            code,
            {"message", "type", "param", "code"},
        )


def test_one_worker_can_be_named(system):
    """As GET names it."""
    row = system.row("qwen")
    answer = system.ask("POST", f"{PATH}/qwen/sleep?worker={row['worker']}")
    assert [each["state"] for each in answer.json()["data"]] == ["asleep"]
