"""A worker's life: loading, registering, final records, draining, hanging, and an engine in its own process."""

import asyncio
import json
from contextlib import contextmanager

import psutil
import pytest

from fastchat.api.event_source import open_sequences
from fastchat.api.served_model import ServedModel
from fastchat.cluster.contract import Load
from fastchat.engine.client import EngineClient, EngineLimits
from fastchat.engine.events import EngineStats, FinishReason, SequenceEvent, SequenceRequest
from fastchat.engine.sampling_params import SamplingParams
from fastchat.errors import CheckpointError, ConfigError, EngineError
from fastchat.gateway.controller_app import ControllerConfig, create_controller_app
from fastchat.models.interface import SamplingDefaults
from fastchat.worker.config import EngineSpec, ModelSpec, WorkerConfig
from fastchat.worker.health import EngineHealth
from fastchat.worker.loaded_model import open_models
from tests.checkpoints import write_checkpoint
from tests.processes import free_port, run_command
from tests.worker.conftest import ENGINE, TOKEN, serving, slowed_down, wait_until, worker_config

CHAT = {"model": "qwen", "messages": [{"role": "user", "content": "Hello"}]}


@contextmanager
def registered_worker(thread, checkpoints):
    """A worker and the controller that knows it."""
    app = create_controller_app(ControllerConfig(cluster_token=TOKEN))
    controller = app.state.controller
    port = free_port()
    with thread.serve(app, on_stop=controller.stop) as url:
        config = worker_config(checkpoints, address=f"http://127.0.0.1:{port}", controller_address=url)
        with serving(thread, config, port=port) as worker:
            wait_until(lambda: controller.table.snapshot().workers)
            yield worker, controller


def test_final_records_reach_the_controller(thread, checkpoints):
    """One for each request, exact for every way to end; all models are registered under all their names."""
    with registered_worker(thread, checkpoints) as (worker, controller):
        (entry,) = controller.table.snapshot().workers
        assert [model.name for model in entry.models] == ["chatglm2-6b", "vicuna-7b-v1.3", "qwen"]
        assert entry.models[0].max_context == 512
        headers = {"x-fastchat-tenant": "t"}
        body = {**CHAT, "max_tokens": 4, "ignore_eos": True}
        usage = worker.post("/v1/chat/completions", body, **headers).json()["usage"]
        request = worker.client.build_request(
            "POST", "/v1/chat/completions", json={**body, "max_tokens": 300, "stream": True}, headers=headers
        )
        with slowed_down(worker):
            response = worker.client.send(request, stream=True)
            lines = (line for line in response.iter_lines() if line.startswith("data: "))
            assert [next(lines)[:6] for _ in range(3)] == ["data: "] * 3  # the role, and two events with tokens
            response.close()
            worker.wait_until_empty()
        worker.post("/v1/embeddings", {"model": "qwen", "input": "Hello"}, **headers)
        wait_until(lambda: any(total.num_requests == 3 for total in controller.ledger.totals()))
        (total,) = controller.ledger.totals()
        assert (total.model, total.tenant, total.num_aborted, total.num_failed) == ("qwen", "t", 1, 0)
        assert total.num_prompt_tokens > 2 * usage["prompt_tokens"]
        assert 4 + 2 <= total.num_generated_tokens < 4 + 300


def test_draining_worker_refuses_new_requests_and_says_goodbye(thread, checkpoints):
    """503 with Retry-After, /health too; the controller's table says draining at once."""
    with registered_worker(thread, checkpoints) as (worker, controller):
        thread.run(worker.runtime.drain())
        answer = worker.post("/v1/chat/completions", CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")
        assert answer.headers["retry-after"]
        assert worker.get("/health").status_code == 503
        assert worker.get("/livez").status_code == 200
        wait_until(lambda: controller.table.snapshot().workers[0].state == "draining")


def test_engine_in_a_process_answers_like_one_in_a_thread(thread, checkpoints, worker):
    """The same ids for greedy, seeded and embedding requests; and its death is seen in /health and in answers."""
    spec = EngineSpec(device="cpu", dtype="float32", engine_place="process", kv_cache_bytes=32 * 2**20)
    models = (ModelSpec(checkpoints["qwen"], ("qwen",)),)
    ends = []
    config = worker_config(checkpoints, models=models, engine=spec)
    with serving(thread, config, end_process=lambda: ends.append("now")) as other:
        for options in ({"temperature": 0}, {"temperature": 1.3, "seed": 4, "n": 2}, {"stop": "e", "seed": 1}):
            body = {**CHAT, "max_tokens": 16, "return_token_ids": True, **options}
            here, there = (each.post("/v1/chat/completions", body).json() for each in (worker, other))
            assert here["choices"] == there["choices"]
        vectors = [
            each.post("/v1/embeddings", {"model": "qwen", "input": "Hi"}).json()["data"] for each in (worker, other)
        ]
        assert vectors[0][0]["embedding"] == pytest.approx(vectors[1][0]["embedding"], abs=1e-6)
        other.wait_until_empty()
        engine = other.runtime.models.find("qwen").engine
        (child,) = (each for each in psutil.Process().children() if "fastchat.worker.engine_process" in each.cmdline())
        child.kill()
        wait_until(lambda: not engine.is_alive)
        assert other.get("/health").status_code == 503
        answer = other.post("/v1/chat/completions", CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) in ((500, "server_error"), (503, "server_error"))
        wait_until(lambda: ends)
        assert other.runtime.has_failed
        assert other.post("/v1/chat/completions", CHAT).json()["error"]["code"] == "shutting_down"


def test_a_model_that_cannot_be_loaded_ends_the_worker_in_one_line(checkpoints, tmp_path):
    """The second of two: the first is given up again, and the last line says which file and what to do."""
    broken = write_checkpoint(tmp_path / "broken", "qwen2", num_shards=1)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "intermediate_size": 95}))
    paths = [flag for folder in (checkpoints["qwen"], broken) for flag in ("--model-path", str(folder))]
    ended = run_command("multi_model_worker", *paths, "--port", "0", "--no-register", state_dir=tmp_path / "state")
    assert ended.returncode == 2
    assert "model loaded" in ended.stderr
    assert "Traceback" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert f"{broken}/model.safetensors: " in last
    assert "config and weights are of different models" in last


def test_a_damaged_file_ends_the_worker_before_any_model_is_loaded(checkpoints, tmp_path):
    """All headers are read first: the memory of all models is planned before a weight is read."""
    broken = write_checkpoint(tmp_path / "broken", "qwen2", num_shards=1)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    paths = [flag for folder in (checkpoints["qwen"], broken) for flag in ("--model-path", str(folder))]
    ended = run_command("multi_model_worker", *paths, "--port", "0", "--no-register", state_dir=tmp_path / "state")
    assert ended.returncode == 2
    assert "model loaded" not in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith(f"error: {file}: truncated")


def test_seed_truncation_and_deadline(thread, checkpoints):
    """`--seed`: the same answer again; `--embed-in-truncate`: long inputs are cut; a deadline that passed is a 503."""
    models = (ModelSpec(checkpoints["qwen"], ("qwen",)),)
    config = worker_config(checkpoints, models=models, default_seed=5, truncates_embedding_input=True)
    with serving(thread, config) as worker:
        body = {**CHAT, "temperature": 1.5, "max_tokens": 20}
        late = worker.post("/v1/embeddings", {"model": "qwen", "input": "x"}, **{"x-fastchat-deadline": "0"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "deadline_exceeded")
        first, second = (worker.post("/v1/chat/completions", body).json()["choices"] for _ in range(2))
        assert first == second
        answer = worker.post("/v1/embeddings", {"model": "qwen", "input": "word " * 2000}).json()
        assert answer["usage"]["prompt_tokens"] == 512


class StillEngine(EngineClient):
    """Implements `EngineClient`: has whatever condition a test gives it."""

    limits = EngineLimits(
        max_context=64, num_blocks=8, block_size=8, vocab_size=100, embedding_size=8, device="cpu", dtype="float32"
    )

    awaits_turn = False

    def __init__(self):
        super().__init__()
        self._failure = None

    def show(self, **stats):
        self._deliver([], EngineStats(**stats))

    def end(self, sequence_id):
        self._deliver([SequenceEvent(sequence_id, finish_reason=FinishReason.STOP)], EngineStats())

    def die(self):
        self._fail(EngineError("dead"))

    async def start(self):
        """Nothing to start."""

    async def close(self):
        """Nothing to close."""

    def _send(self, request):
        """Never answers."""

    def _send_abort(self, sequence_id):
        """Never answers."""


def request(sequence_id):
    return SequenceRequest(sequence_id, (5, 6), SamplingParams(max_tokens=3))


def still_model(engine):
    return ServedModel((), None, None, engine, 1, SamplingDefaults(), 0)


def test_first_step_that_hangs_is_seen():
    """An engine reports what runs after a step only: what was submitted counts before, and until its end has come."""
    now = 0.0
    engine = StillEngine()
    health = EngineHealth([still_model(engine)], lambda: now, hang_after_s=30)
    now = 100.0
    assert health.problem() is None
    engine.submit(request("r1"))
    engine.submit(request("r2"))
    assert health.load() == Load(num_waiting=2)
    now = 131.0
    assert health.problem() == "an engine hangs"
    engine.abort("r1")
    assert health.problem() == "an engine hangs"
    engine.end("r1")
    engine.end("r2")
    assert health.problem() is None


def test_an_engine_that_waits_for_the_device_does_not_hang():
    """A step of a large model on few cores takes longer than a hang may; whose step it is moves, or hangs itself."""
    now = 0.0
    engine = StillEngine()
    health = EngineHealth([still_model(engine)], lambda: now, hang_after_s=30)
    engine.submit(request("r1"))
    engine.awaits_turn = True
    assert health.problem() is None
    now = 100.0
    assert health.problem() is None
    engine.awaits_turn = False
    now = 129.0
    assert health.problem() is None
    now = 131.0
    assert health.problem() == "an engine hangs"


def test_an_answer_that_nobody_reads_is_no_hang():
    """The engine has done its part; how long a client takes to read it says nothing of the engine."""
    now = 0.0
    engine = StillEngine()
    model = still_model(engine)
    health = EngineHealth([model], lambda: now, hang_after_s=30)

    async def read_slowly():
        nonlocal now
        async with open_sequences(model, [request("r1")]) as answer:
            engine.end("r1")
            now = 100.0
            assert health.problem() is None
            assert health.load() == Load()
            assert (await answer.next_events())[-1].finish_reason is FinishReason.STOP

    asyncio.run(read_slowly())


def test_hanging_engine_is_seen_beside_a_busy_one():
    """No progress with work pending is a hang, whatever the other engines do; without work it is rest."""
    now = 0.0
    busy, still = StillEngine(), StillEngine()
    health = EngineHealth([still_model(busy), still_model(still)], lambda: now, hang_after_s=30)
    for second in range(40):
        now = float(second)
        busy.show(progress=second, num_running=1)
        still.show(progress=7)
        assert health.load() == Load(progress=second + 7, num_running=1)
    still.show(progress=8, num_waiting=1, num_queued_tokens=5)
    assert health.problem() is None
    now += 29
    busy.show(progress=41, num_running=1)
    assert health.load().progress == 49
    now += 2
    busy.show(progress=42, num_running=1)
    assert health.problem() == "an engine hangs"
    assert health.load() == Load(progress=49, num_running=1, num_waiting=1, num_queued_tokens=5)
    still.show(progress=9, num_waiting=1)
    assert health.problem() is None
    still.die()
    assert health.problem() == "an engine died"


def test_bad_models_are_told_before_any_weight_is_read(checkpoints, tmp_path):
    """One line each: no such folder, a name that is there twice or unreadable, a format that does not exist."""
    with pytest.raises(CheckpointError, match="no such folder"):
        open_models(worker_config(checkpoints, models=(ModelSpec(tmp_path / "none"),)))
    with pytest.raises(ConfigError, match="'qwen'"):
        open_models(worker_config(checkpoints, models=(ModelSpec(checkpoints["qwen"]),) * 2))
    with pytest.raises(ConfigError, match=r"'\\udce6' cannot be read in this locale"):
        open_models(worker_config(checkpoints, models=(ModelSpec(checkpoints["qwen"], ("\udce6",)),)))
    with pytest.raises(ConfigError, match="no-such-format"):
        open_models(worker_config(checkpoints, models=(ModelSpec(checkpoints["qwen"], (), "no-such-format"),)))
    with pytest.raises(ConfigError, match="--pin names 'vicuna'"):
        open_models(worker_config(checkpoints, pinned=("vicuna",)), on_demand=True)


@pytest.mark.parametrize(
    "options", [{"models": ()}, {"cluster_token": ""}, {"stream_interval": 0}, {"default_seed": 2**63}], ids=str
)
def test_config_is_checked_where_it_is_made(checkpoints, options):
    """A worker that cannot be is refused before it begins."""
    with pytest.raises(ConfigError):
        worker_config(checkpoints, **options)
    with pytest.raises(ConfigError):
        EngineSpec(max_context=0)
    with pytest.raises(ConfigError):
        ModelSpec(checkpoints["qwen"], ("a", ""))


def test_token_stays_out_of_the_configs_repr(checkpoints):
    """What is logged by mistake shows no secret."""
    config = WorkerConfig((ModelSpec(checkpoints["qwen"]),), "http://127.0.0.1:1", TOKEN, engine=ENGINE)
    assert TOKEN not in repr(config)
