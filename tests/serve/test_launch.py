"""`fastchat serve` as a user runs it: one command to an answer, and nothing left of it, however it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request

import psutil
import pytest

from fastchat.config import read_environment
from fastchat.errors import UnavailableError
from fastchat.models.checkpoint import Checkpoint
from fastchat.serve.demo_model import DEMO_MODEL
from fastchat.serve.http_server import Listeners
from fastchat.serve.launch import (
    Ports,
    ServedWorker,
    _choose_ports,
    create_serve_parser,
    process_specs,
    ready_block,
    serving_flags,
)
from fastchat.serve.model_worker import create_model_worker_parser
from fastchat.serve.openai_api_server import create_api_server_parser
from fastchat.serve.worker_arguments import worker_config
from fastchat.worker.model_groups import ModelGroup
from tests.checkpoints import write_checkpoint
from tests.processes import START_LIMIT_S, ServerProcess

NAMES = ("chatglm2-6b", "tiny-llama")
ANY_PORTS = ("--port", "0", "--controller-port", "0", "--worker-port", "0", "--no-web")
SHORT = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
LONG = {**SHORT, "max_tokens": 1500}


class Serving(ServerProcess):
    """`fastchat serve` with small models and any ports."""

    def __init__(self, state_dir, *flags, ports=ANY_PORTS):
        super().__init__(
            [sys.executable, "-m", "fastchat", "serve", *ports, *flags],
            # One thread computes a tiny model fastest, above all on a machine that does other things too.
            environment={"FASTCHAT_STATE_DIR": str(state_dir), "OMP_NUM_THREADS": "1"},
        )

    @property
    def api_url(self):
        return self.wait_for_line(r"export OPENAI_BASE_URL=(\S+)/v1$")[1]

    def pid_of(self, what, *, other_than=None):
        """The newest process started under a name; one that is not `other_than`."""
        pids = re.findall(rf'process started process="?{re.escape(what)}"? pid=(\d+)', self.log)
        assert pids
        assert int(pids[-1]) != other_than
        return int(pids[-1])

    def kill_part(self, what):
        """SIGKILL one process; returns when its successor is ready."""
        pid = self.pid_of(what)
        psutil.Process(pid).kill()
        self.wait_for_line(rf'process is back process="?{re.escape(what)}"?$')
        assert self.pid_of(what, other_than=pid)

    def family(self):
        """All processes of it that are alive, itself first."""
        me = psutil.Process(self.pid)
        return [me, *me.children(recursive=True)]

    def post(self, path, body):
        request = urllib.request.Request(
            self.api_url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return urllib.request.urlopen(request, timeout=60)

    def answer(self, model, **options):
        body = {"model": model, "prompt": "Hello", "max_tokens": 8, "temperature": 0, **options}
        with self.post("/v1/completions", body) as answer:
            return json.load(answer)["choices"][0]["text"]

    def answer_when_there(self, model):
        """The answer of a model that is just coming back: the API server says 503 until it has registered again."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.answer(model)
            except urllib.error.HTTPError as error:
                if error.code not in (404, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(0.05)


class Stream:
    """A greedy stream, read in a thread; `text` is what came."""

    def __init__(self, serving, model, options=LONG):
        body = {"model": model, "prompt": "Hello", "stream": True, **options}
        self._answer = serving.post("/v1/completions", body)
        self.lines = [self._answer.readline()]
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        with self._answer:
            self.lines += self._answer.readlines()

    @property
    def is_running(self):
        return self._reader.is_alive()

    def result(self):
        """The text, the reason why it ended, and whether the end came properly."""
        self._reader.join(60)
        events = [line[6:].strip() for line in self.lines if line.startswith(b"data: ")]
        choices = [json.loads(event)["choices"][0] for event in events[:-1]]
        reasons = [choice["finish_reason"] for choice in choices if choice["finish_reason"]]
        return "".join(choice["text"] for choice in choices), reasons, events[-1] == b"[DONE]"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two models, one of each layout."""
    folder = tmp_path_factory.mktemp("models")
    first = write_checkpoint(folder / NAMES[0], "chatglm2", config={"seq_length": 2048})
    return first, write_checkpoint(folder / NAMES[1], "llama")


@pytest.fixture(scope="module")
def serving(folders, tmp_path_factory):
    """Both models, one worker each, ready."""
    flags = [word for folder in folders for word in ("--model-path", folder)]
    with Serving(tmp_path_factory.mktemp("state"), *flags) as serving:
        serving.wait_for_line("Ctrl-C stops everything")
        yield serving


@pytest.fixture(scope="module")
def whole(serving):
    """The long answer of the first model."""
    return serving.answer(NAMES[0], **LONG)


def test_ready_block_says_what_to_paste_and_the_models_answer(serving):
    """URLs, models, exports and a curl line; every model answers, each from its own process."""
    url = serving.api_url
    block = serving.log[serving.log.index("\nReady.") :]
    assert f"API     {url}/v1\n" in block
    assert f"health  {url}/health\n" in block
    assert f"models  {', '.join(NAMES)}\n" in block
    assert "export OPENAI_API_KEY=EMPTY\n" in block
    assert f"curl {url}/v1/chat/completions" in block
    with urllib.request.urlopen(f"{url}/health", timeout=60) as health:
        assert json.load(health)["status"] == "ready"
    assert all(serving.answer(name) for name in NAMES)
    assert serving.pid_of(f"worker of {NAMES[0]}") != serving.pid_of(f"worker of {NAMES[1]}")


def test_worker_killed_is_back_and_the_other_s_stream_is_undisturbed(serving, whole):
    """The stream of another worker ends as it would have; the killed one answers as before, on its old port."""
    expected = serving.answer(NAMES[1])
    stream = Stream(serving, NAMES[0])
    assert stream.is_running
    serving.kill_part(f"worker of {NAMES[1]}")
    assert stream.result() == (whole, ["length"], True)
    assert serving.answer_when_there(NAMES[1]) == expected


def test_controller_killed_disturbs_nobody(serving, whole):
    """Streams go on, new requests are answered meanwhile, and it comes back."""
    stream = Stream(serving, NAMES[0])
    pid = serving.pid_of("controller")
    psutil.Process(pid).kill()
    assert serving.answer(NAMES[1])
    serving.wait_for_line("process is back process=controller")
    assert serving.pid_of("controller", other_than=pid)
    assert stream.result() == (whole, ["length"], True)
    assert all(serving.answer_when_there(name) for name in NAMES)


def test_api_server_killed_is_back_on_its_port(serving):
    """A client that comes again finds all models at the same URL; the workers were not touched."""
    workers = [serving.pid_of(f"worker of {name}") for name in NAMES]
    serving.kill_part("API server")
    assert all(serving.answer_when_there(name) for name in NAMES)
    assert [serving.pid_of(f"worker of {name}") for name in NAMES] == workers


def test_first_sigterm_lets_a_stream_finish_and_leaves_nothing(serving):
    """The last test of this instance: exit code 0, no process of it left."""
    whole = serving.answer(NAMES[0], **SHORT)
    family = serving.family()
    stream = Stream(serving, NAMES[0], SHORT)
    serving.signal(signal.SIGTERM)
    assert stream.result() == (whole, ["length"], True)
    assert serving.wait(limit_s=60) == 0
    assert not alive_after(family)
    assert "Traceback" not in serving.log


def test_engine_process_killed_is_noticed_and_serve_killed_leaves_no_orphan(folders, tmp_path):
    """A worker without its engine is replaced; and nobody can catch SIGKILL, so each process watches its link."""
    with Serving(tmp_path, "--model-path", folders[0], "--engine-process", "process") as serving:
        serving.wait_for_line("Ctrl-C stops everything")
        expected = serving.answer(NAMES[0])
        family = serving.family()
        assert len(family) == 5
        (engine,) = [process for process in family if "fastchat.worker.engine_process" in process.cmdline()]
        engine.kill()
        serving.wait_for_line('process is back process="worker of')
        assert serving.answer_when_there(NAMES[0]) == expected
        family = serving.family()
        assert len(family) == 5
        serving.kill()
        assert not alive_after(family, limit_s=30.0)


def test_ctrl_c_while_the_model_loads_is_obeyed_at_once(folders, tmp_path):
    """As a terminal sends it, to the whole group: one orderly end, exit code 0, no traceback."""
    with Serving(tmp_path, "--model-path", folders[0]) as serving:
        serving.wait_for_line("waiting for the model")
        family = serving.family()
        for process in family:
            process.send_signal(signal.SIGINT)
        assert serving.wait(limit_s=60) == 0
        assert not alive_after(family)
        assert "Traceback" not in serving.log


@pytest.mark.parametrize("fault", ["no folder", "truncated", "wrong shape"])
def test_bad_checkpoint_is_one_line_and_exit_code_2(tmp_path, folders, fault):
    """The last line says which file and what to do; nothing is left running, whoever found the fault."""
    folder = tmp_path / "bad"
    if fault != "no folder":
        write_checkpoint(folder, "llama")
    if fault == "truncated":
        shard = sorted(folder.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes()[:-100])
    if fault == "wrong shape":  # found by the worker, while the other processes run already
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] + 128}))
    with Serving(tmp_path / "state", "--model-path", folder) as serving:
        assert serving.wait(limit_s=START_LIMIT_S) == 2
        lines = serving.log.splitlines()
        assert lines[-1].startswith("error: ")
        assert str(folder) in lines[-1]
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "Traceback" not in serving.log
        assert not group_of(serving)
        if fault != "wrong shape":
            assert len(lines) == 1


def group_of(serving):
    """The processes of its group, which all that it starts belong to."""
    return [process for process in psutil.process_iter() if _group_id(process) == serving.pid]


def _group_id(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def alive_after(processes, *, limit_s=0.5):
    """Those that still run when the time is over. One that nobody has waited for yet has ended all the same."""
    deadline = time.monotonic() + limit_s
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _is_alive(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_port_in_use_is_one_line_that_names_the_flag(folders, tmp_path):
    """Told before anything is started; exit code 69."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with Serving(tmp_path, "--model-path", folders[0], ports=("--port", port, *ANY_PORTS[2:])) as serving:
            assert serving.wait(limit_s=60) == 69
            one_line = rf"error: port {port} of localhost is in use; .* give another --port\."
            assert re.fullmatch(one_line, serving.log)
        for flag in ("--controller-port", "--worker-port", "--web-port"):
            arguments = create_serve_parser().parse_args([*ANY_PORTS[:-1], "--web-port", "0", flag, port])
            with pytest.raises(UnavailableError, match=f"port {port} of .* give another {flag}"):
                _choose_ports(arguments, 1)


def test_two_models_of_one_name_are_refused(folders, tmp_path):
    """They would be taken for two workers of one model, and answer in turn."""
    with Serving(tmp_path, "--model-path", folders[0], "--model-path", folders[0]) as serving:
        assert serving.wait(limit_s=60) == 2
        assert serving.log == f"error: Two models are named {NAMES[0]!r}; give each its own with --model-names."


GROUP = ModelGroup(Checkpoint.open(DEMO_MODEL), ("a", "b"), None)
WORKER = ServedWorker((GROUP,), memory_flags=("--max-gpu-memory=123",))
FLAGS = [
    *("--device", "cpu", "--dtype", "float32", "--max-gpu-memory", "13GiB", "--kv-cache-memory", "1GiB"),
    *("--max-context", "2048", "--max-batch-tokens", "64", "--engine-process", "thread", "--limit-worker", "5"),
    *("--stream-interval", "2", "--seed", "-7", "--embed-in-truncate", "--debug"),
    *("--api-keys", "k1,k2", "--allowed-origins", '["https://example.org"]', "--allow-credentials", "--ssl"),
    *("--host", "0.0.0.0"),
    *("--idle-timeout", "90", "--pin", "b,c"),
]


def command_of(name, arguments):
    specs = process_specs(arguments, (WORKER, WORKER), Ports(api=1, controller=2, workers=(3, 4)))
    (spec, *_) = [spec for spec in specs if spec.name.startswith(name)]
    return spec.command()[3:]


def environment_of(name, arguments):
    specs = process_specs(arguments, (WORKER, WORKER), Ports(api=1, controller=2, workers=(3, 4)))
    return next(dict(spec.environment) for spec in specs if spec.name.startswith(name))


def test_worker_s_flags_are_handed_on():
    """Whatever is said to `fastchat serve` reaches the worker as if it had been said to it."""
    arguments = create_serve_parser().parse_args(["--model-path", "x", *FLAGS])
    there = create_model_worker_parser().parse_args(command_of("worker", arguments))
    listeners = Listeners("localhost", 3, ())
    environment = read_environment({"FASTCHAT_CLUSTER_TOKEN": "t" * 32})
    config = worker_config(there, environment, listeners, (GROUP,))
    engine = config.engine
    assert (engine.device, engine.dtype, engine.engine_place) == ("cpu", "float32", "thread")
    assert (engine.max_device_bytes, engine.kv_cache_bytes) == (123, 2**30)  # its share of the 13 GiB
    assert (engine.max_context, engine.max_batch_tokens, engine.max_running) == (2048, 64, 5)
    assert (config.stream_interval, config.default_seed, config.truncates_embedding_input) == (2, -7, True)
    assert (there.host, there.port, there.controller_address) == ("localhost", 3, "http://127.0.0.1:2")
    assert (there.model_names, there.debug) == (("a", "b"), "true")
    assert (config.idle_timeout_s, config.pinned) == (90, ("b",))  # c is another worker's


def test_api_server_s_flags_are_handed_on():
    """Keys, CORS and TLS are the API server's; the others stay on this machine and speak plainly."""
    arguments = create_serve_parser().parse_args(["--model-path", "x", *FLAGS])
    there = create_api_server_parser().parse_args(command_of("API server", arguments))
    assert (there.host, there.port, there.ssl) == ("0.0.0.0", 1, True)
    assert there.api_keys is None
    assert environment_of("API server", arguments)["FASTCHAT_API_KEYS"] == "k1,k2", "never on a command line"
    assert (there.allowed_origins, there.allowed_methods) == (["https://example.org"], ["*"])
    assert there.allow_credentials
    assert "--ssl" not in command_of("controller", arguments) + command_of("worker", arguments)


@pytest.mark.parametrize("keys", [[], ["--api-keys", "k1,k2"]])
def test_the_page_has_a_key_of_its_own(keys):
    """Made at each start and told to the API server and the page alone, by their environment."""
    arguments = create_serve_parser().parse_args(["--model-path", "x", *keys])
    specs = process_specs(arguments, (WORKER,), Ports(api=1, controller=2, workers=(3,), web=4))
    environments = {spec.name: dict(spec.environment) for spec in specs}
    key = environments["page"]["FASTCHAT_API_KEY"]
    assert len(key) > 32
    assert environments["API server"]["FASTCHAT_PAGE_KEY"] == key
    assert [name for name, environment in environments.items() if key in environment.values()] == ["API server", "page"]
    assert not any(key in word for spec in specs for word in spec.command())
    again = process_specs(arguments, (WORKER,), Ports(api=1, controller=2, workers=(3,), web=4))
    assert key not in str([spec.environment for spec in again])
    assert read_environment(environments["API server"]).page_key == key
    assert key not in repr(read_environment(environments["API server"]))


def test_ready_block_with_keys_shows_none():
    """It says where the key goes, and the curl line sends it."""
    block = ready_block("http://127.0.0.1:8000", ["it's 小"], has_keys=True)
    assert "export OPENAI_API_KEY='<one of your API keys>'" in block
    assert '-H "Authorization: Bearer $OPENAI_API_KEY"' in block
    assert "it'\\''s 小" in block


@pytest.mark.skipif(not (DEMO_MODEL / "config.json").is_file(), reason="the demo model is not in this tree")
def test_without_a_model_the_demo_answers(tmp_path):
    """And says in one line that it is tiny, and how to give a real one."""
    with Serving(tmp_path) as serving:
        serving.wait_for_line(r"tiny demo; serve a real one with --model-path")
        serving.wait_for_line("Ctrl-C stops everything")
        assert serving.answer("chatglm2-demo")


def test_quantization_is_handed_on_to_every_worker():
    """All three flags, where they are given."""
    for flags in (["--load-8bit"], ["--quantize=int4", "--quantize-group-size=32"], []):
        assert serving_flags(create_serve_parser().parse_args(flags)) == flags
