"""Adapters added and removed while everything runs: through real API servers, a controller and two workers."""

import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import httpx2
import orjson
import pytest

from fastchat.errors import ConfigError, UnavailableError
from fastchat.gateway.app import create_api_app
from fastchat.gateway.config import ApiServerConfig
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from fastchat.ops.key_store import KeyStore
from fastchat.serve.model_control_command import name_and_path
from fastchat.worker.config import EngineSpec, ModelSpec
from fastchat.worker.present_adapters import HeldAdapter, PresentAdapters
from tests.adapters import modules_of, write_lora, write_merged
from tests.checkpoints import write_checkpoint
from tests.processes import free_port, run_command
from tests.worker.adapter_system import BASE, PATH, PROMPT, Stream, System
from tests.worker.conftest import TOKEN, serving, wait_until, worker_config
from tests.worker.test_prefix_tuning import write_prefix

ENGINE = EngineSpec(device="cpu", dtype="float32", kv_cache_bytes=2**22, max_running=8, adapter_reserve_bytes=2**20)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """`allowed` is what the workers may read."""
    root = tmp_path_factory.mktemp("adapters")
    base = write_checkpoint(root / BASE, "chatglm2")
    changes = write_lora(root / "allowed" / "lora", base, modules_of("chatglm2"))
    write_lora(root / "allowed" / "other", base, modules_of("chatglm2"), seed=2)
    write_lora(root / "outside", base, modules_of("chatglm2"))
    write_prefix(root / "allowed" / "prefix", base)
    foreign = write_checkpoint(root / "foreign", "qwen2")
    write_lora(root / "allowed" / "foreign", foreign, modules_of("qwen2"))
    (root / "allowed" / "empty").mkdir()
    (root / "allowed" / "way-out").symlink_to(root / "outside")
    write_merged(root / "merged", base, changes)
    return root


def config_of(checkpoints, folders, **options):
    models = (ModelSpec(folders / BASE, (BASE, "vicuna-7b-v1.3")),)
    return worker_config(checkpoints, **{"models": models, "adapter_dir": folders / "allowed", **options})


def made_keys(path):
    store, keys = KeyStore(path), {}
    for name in ("client", "operator"):
        _, keys[name] = store.create(
            name=name, created_at=int(time.time()), expires_at=None, is_operator=name == "operator"
        )
    store.close()
    return keys


@pytest.fixture(scope="module")
def running(thread, checkpoints, folders, tmp_path_factory):
    store_path = tmp_path_factory.mktemp("keys") / "keys.sqlite3"
    keys = made_keys(store_path)
    controller_port = free_port()
    with ExitStack() as stack, ExitStack() as controller:

        def start_controller():
            app = create_controller_app(ControllerConfig(cluster_token=TOKEN))
            return controller.enter_context(thread.serve(app, controller_port, on_stop=app.state.controller.stop))

        @contextmanager
        def restarted_controller():
            """The block runs while there is none; afterwards there is a new one, which knows nobody yet."""
            controller.close()
            yield
            start_controller()

        url = start_controller()
        workers = []
        for place in ("thread", "process"):
            port = free_port()
            engine = replace(ENGINE, engine_place=place)
            address = {"address": f"http://127.0.0.1:{port}", "controller_address": url}
            config = config_of(checkpoints, folders, engine=engine, **address)
            workers.append(stack.enter_context(serving(thread, config, port=port)))
        gateway = ApiServerConfig(cluster_token=TOKEN, controller_address=url, key_store_path=store_path)
        api_url = stack.enter_context(thread.serve(create_api_app(gateway)))
        made = System(api_url, keys, workers, restarted_controller)
        wait_until(lambda: len(made.ask("GET", PATH).json().get("workers", ())) == 2)
        yield made


@pytest.fixture
def system(running):
    yield running
    running.cleared()


def test_an_adapter_comes_and_goes_on_all_workers_of_its_base(system, thread, checkpoints, folders):
    """It answers as its merged model; the base answers as before, beside it and after it."""
    before = [system.text(BASE) for _ in range(4)]
    answer = system.add("style", "lora", base="vicuna-7b-v1.3")
    assert answer.status_code == 200, answer.text
    assert [row["adapters"] for row in answer.json()["data"]] == [["style"], ["style"]]
    wait_until(lambda: "style" in system.names())
    merged = config_of(checkpoints, folders, models=(ModelSpec(folders / "merged"),), engine=ENGINE)
    with serving(thread, merged) as worker:
        body = {"model": "merged", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        expected = worker.post("/v1/completions", body).json()["choices"][0]["text"]
    assert [system.text("style") for _ in range(4)] == [expected] * 4
    assert [system.text(BASE) for _ in range(4)] == before
    assert [row["adapters"] for row in system.remove("style").json()["data"]] == [[], []]
    wait_until(lambda: "style" not in system.names())
    assert system.code(system.complete("style")) == (503, "no_worker")
    assert system.text(BASE) == before[0]


def test_memory_is_counted_as_long_as_it_is_held(system):
    """The base takes more with an adapter, and as much as before without it."""
    before = [row["memory_bytes"] for row in system.rows()]
    (first, second) = (row["memory_bytes"] for row in system.add("style", "lora").json()["data"])
    assert first == second == before[0] + 4 * 2 * sum_of_ranks()
    assert [row["memory_bytes"] for row in system.remove("style").json()["data"]] == before


def sum_of_ranks():
    """Half of the numbers of the adapter: rank 4 over both layers' four modules, inputs and outputs."""
    sizes = ((48, 128), (64, 48), (48, 192), (96, 48))
    return 4 * sum(inputs + outputs for inputs, outputs in sizes)


def test_a_prefix_comes_while_its_base_sleeps_and_stays_through_sleep(system):
    """Adding wakes the base; what sleeps and wakes again has its present adapters, and no removed ones."""
    worker = system.workers[0]

    def sleep():
        worker.post(f"{PATH}/{BASE}/sleep", {})
        assert worker.get(PATH).json()["data"][0]["state"] == "asleep"

    def text(name):
        body = {"model": name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        return worker.post("/v1/completions", body).json()["choices"][0]["text"]

    sleep()
    for name in ("prefix", "lora"):
        (row,) = system.add(name, worker=worker).json()["data"]
        assert row["state"] == "awake"
    expected = {name: text(name) for name in (BASE, "prefix", "lora")}
    assert len(set(expected.values())) == 3
    sleep()
    assert {name: text(name) for name in expected} == expected
    sleep()
    wait_until(lambda: "prefix" in system.names())
    assert system.remove("prefix", worker=worker).status_code == 200
    assert text("lora") == expected["lora"]
    assert worker.get(PATH).json()["data"][0]["adapters"] == ["lora"]


def test_a_lost_adapter_does_not_keep_its_base_from_waking(system, folders):
    """Its folder is gone while all sleep: the base and the other adapters answer, it is removed and can come back."""
    lost = write_lora_copy(folders / "allowed" / "lost", folders)
    worker = system.workers[0]
    for name in ("lost", "lora"):
        assert system.add(name, worker=worker).status_code == 200
    body = {"prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    expected = {name: worker.post("/v1/completions", {**body, "model": name}).content for name in ("lost", "lora")}
    worker.post(f"{PATH}/{BASE}/sleep", {})
    lost.rename(lost.with_name("elsewhere"))
    statuses = {name: worker.post("/v1/completions", {**body, "model": name}).status_code for name in (BASE, *expected)}
    assert statuses == {BASE: 200, "lost": 500, "lora": 200}
    assert system.remove("lost", worker=worker).status_code == 200
    lost.with_name("elsewhere").rename(lost)
    assert system.add("lost", worker=worker).status_code == 200
    again = worker.post("/v1/completions", {**body, "model": "lost"})
    assert again.json()["choices"] == orjson.loads(expected["lost"])["choices"]


def write_lora_copy(folder, folders):
    write_lora(folder, folders / BASE, modules_of("chatglm2"), seed=7)
    return folder


@pytest.mark.parametrize("index", [0, 1], ids=["thread", "process"])
def test_what_runs_ends_in_peace_while_its_adapter_goes_and_one_of_its_name_comes(system, index):
    """The stream has its own adapter to its end, newcomers get the new one; then the old one's memory is free."""
    worker = system.workers[index]

    def memory():
        (row,) = (row for row in system.rows() if row["worker"] == worker.runtime.worker_id)
        return row["memory_bytes"]

    at_first = memory()
    system.add("style", "lora", worker=worker)
    expected = Stream(system, "style", worker).text()
    stream = Stream(system, "style", worker)
    assert system.remove("style", worker=worker).json()["data"][0]["adapters"] == []
    assert worker.post("/v1/completions", {"model": "style", "prompt": PROMPT}).status_code == 404
    assert system.add("style", "other", worker=worker).status_code == 200
    newer = Stream(system, "style", worker)
    assert stream.text() == expected
    assert newer.text() != expected
    one_adapter = 4 * 2 * sum_of_ranks()
    wait_until(lambda: memory() == at_first + one_adapter)


def test_a_request_whose_adapter_goes_before_it_begins_is_told_to_come_again():
    """What the engine calls an adapter is nobody's business; asked again, the name is known or it is not."""
    present = PresentAdapters([HeldAdapter("kept", "/kept", 5), HeldAdapter("gone#1", "/gone", 5)])
    present.drop(present.retire("gone#1"))
    with pytest.raises(UnavailableError, match="was removed") as caught, present.used("gone#1"):
        pass
    assert "#" not in caught.value.message


def test_the_same_name_twice_at_once_is_served_once(system):
    """One is served, the other is told; also while the base is being loaded for them."""
    worker = system.workers[0]
    worker.post(f"{PATH}/{BASE}/sleep", {})
    outcomes = []
    askers = [
        threading.Thread(target=lambda path=path: outcomes.append(system.add("style", path, worker=worker)))
        for path in ("lora", "other", "lora", "other")
    ]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(60)
    assert sorted(answer.status_code for answer in outcomes) == [200, 409, 409, 409]
    codes = {answer.json()["error"]["code"] for answer in outcomes if answer.status_code != 200}
    assert codes == {"model_name_taken"}


def test_several_workers_each_tell_how_it_went(system):
    """One that has the name already fails and is named; the other has the adapter."""
    first, second = system.workers
    system.add("style", "lora", worker=first)
    answer = system.add("style", "lora")
    assert system.code(answer) == (409, "model_name_taken")
    message = answer.json()["error"]["message"]
    assert message.startswith("It failed on 1 of 2 workers.")
    assert first.runtime.worker_id in message
    assert second.runtime.worker_id not in message
    assert [row["adapters"] for row in system.rows()] == [["style"], ["style"]]


def test_a_new_controller_knows_the_names_of_now(system):
    """Those that came and went before it and while there was none."""
    system.add("style", "lora")
    wait_until(lambda: "style" in system.names())
    with system.restarted_controller():
        for worker in system.workers:
            wait_until(lambda worker=worker: not worker.runtime._connection.is_connected)
            assert worker.post(f"{PATH}/{BASE}/adapters", {"name": "late", "path": "other"}).status_code == 200
    wait_until(lambda: {"style", "late"} <= system.names())
    assert system.text("late") != system.text("style")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"name": "x", "path": "../outside"}, 403, "adapters_not_allowed"),
        ({"name": "x", "path": "/etc"}, 403, "adapters_not_allowed"),
        ({"name": "x", "path": "way-out"}, 403, "adapters_not_allowed"),
        ({"name": "x", "path": "."}, 403, "adapters_not_allowed"),
        ({"name": "x", "path": "a\0b"}, 400, "adapter_refused"),
        ({"name": "x", "path": "nowhere"}, 400, "adapter_refused"),
        ({"name": "x", "path": "empty"}, 400, "adapter_refused"),
        ({"name": "x", "path": "foreign"}, 400, "adapter_refused"),
        ({"name": BASE, "path": "lora"}, 409, "model_name_taken"),
        ({"name": " x", "path": "lora"}, 400, "invalid_value"),
        ({"name": "a/adapters/b", "path": "lora"}, 400, "invalid_value"),
        ({"name": "x", "path": "lora", "rank": 3}, 400, "invalid_value"),
        ({"path": "lora"}, 400, "missing_required_parameter"),
    ],
    ids=str,
)
def test_what_cannot_be_added_changes_nothing(system, body, status, code):
    before = system.rows()
    answer = system.ask("POST", f"{PATH}/{BASE}/adapters", json=body)
    assert system.code(answer) == (status, code), answer.text
    after = system.rows()
    assert [(row["memory_bytes"], row["adapters"]) for row in after] == [
        (row["memory_bytes"], row["adapters"]) for row in before
    ]


def test_who_may_and_what_is_there(system):
    """An operator's key; a base that is served; an adapter of that base."""
    assert system.code(system.add("x", "lora", key="client")) == (403, "operator_key_needed")
    assert system.code(system.remove("x", key="client")) == (403, "operator_key_needed")
    assert system.code(system.add("x", "lora", base="nobody")) == (404, "model_not_found")
    assert system.code(system.remove("nobody")) == (404, "model_not_found")
    assert system.remove(BASE).status_code == 400
    system.add("style", "lora")
    wait_until(lambda: "style" in system.names())
    assert system.add("x", "lora", base="style").status_code == 400
    url = system.workers[0].url
    assert httpx2.post(f"{url}{PATH}/{BASE}/adapters", json={"name": "x", "path": "lora"}).status_code == 401


def test_a_worker_without_a_folder_takes_none(thread, checkpoints, folders):
    """The default."""
    with serving(thread, config_of(checkpoints, folders, adapter_dir=None, engine=ENGINE)) as worker:
        answer = worker.post(f"{PATH}/{BASE}/adapters", {"name": "x", "path": str(folders / "allowed" / "lora")})
        assert answer.status_code == 403
        assert "--adapter-dir" in answer.json()["error"]["message"]


def test_what_has_no_room_is_refused_with_the_figures(thread, checkpoints, folders):
    """And the base answers on with what it had."""
    small = replace(ENGINE, adapter_reserve_bytes=2**14)
    with serving(thread, config_of(checkpoints, folders, engine=small)) as worker:
        residency = worker.runtime.control._keeper.residency
        residency.budget_bytes = residency.used_bytes + 2**14  # what a budget of the least would leave
        answer = worker.post(f"{PATH}/{BASE}/adapters", {"name": "x", "path": "lora"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_does_not_fit"
        assert "--adapter-memory" in answer.json()["error"]["message"]
        assert worker.post("/v1/completions", {"model": BASE, "prompt": PROMPT}).status_code == 200
        assert worker.get(PATH).json()["data"][0]["adapters"] == []


def test_the_command_adds_and_removes(system, tmp_path):
    """A name and its folder; a name alone is both."""

    def models(*words):
        flags = ("--url", system.url, "--api-key", system.keys["operator"])
        return run_command("models_command", *words, *flags, state_dir=tmp_path)

    assert "+style" in models("add-adapter", BASE, "style=lora").stdout
    wait_until(lambda: "style" in system.names())
    assert "+style" not in models("remove-adapter", BASE, "style").stdout
    assert (name_and_path("lora"), name_and_path("a=b=c")) == (("lora", "lora"), ("a", "b=c"))
    for text in ("=x", "x=", ""):
        with pytest.raises(ConfigError):
            name_and_path(text)


def test_metrics_say_where_a_model_is_and_how_it_came_there(system):
    """State, bytes, loads, reasons for leaving and time to wake; requests of an adapter under its name."""
    worker = system.workers[0]
    worker.post(f"{PATH}/{BASE}/sleep", {})
    lines = worker.get("/metrics").text.splitlines()
    assert f'fastchat_model_state{{model_name="{BASE}",state="asleep"}} 1.0' in lines
    assert f'fastchat_model_state{{model_name="{BASE}",state="awake"}} 0.0' in lines
    assert f'fastchat_model_held_bytes{{model_name="{BASE}"}} 0.0' in lines
    assert worker.post(f"{PATH}/{BASE}/adapters", {"name": "style", "path": "lora"}).status_code == 200
    body = {"model": "style", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    assert worker.post("/v1/completions", body).status_code == 200
    ended = 'fastchat_request_success_total{finished_reason="length",model_name="style"}'
    wait_until(lambda: ended in worker.get("/metrics").text)
    text = worker.get("/metrics").text
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    assert counts[f'fastchat_model_state{{model_name="{BASE}",state="awake"}}'] == "1.0"
    loads = float(counts[f'fastchat_model_loads_total{{model_name="{BASE}",outcome="loaded"}}'])
    left = float(counts[f'fastchat_model_unloads_total{{model_name="{BASE}",reason="operator"}}'])
    assert loads == left + 1 == float(counts[f'fastchat_model_wake_seconds_count{{model_name="{BASE}"}}'])
