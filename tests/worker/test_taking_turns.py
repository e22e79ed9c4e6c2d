"""Two models that do not fit together, in one real worker: they take turns in memory; nobody notices but by time."""

import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch

from fastchat.models.checkpoint import Checkpoint
from fastchat.worker.config import EngineSpec
from fastchat.worker.device_memory import DeviceMemory
from fastchat.worker.memory_plan import plan_memory, plan_turns
from fastchat.worker.model_needs import PlannedModel
from tests.checkpoints import write_checkpoint
from tests.processes import start_command
from tests.worker.test_memory_measured import peak_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

TOKEN = "a-token-of-the-tests-with-32-letters"
SIZES = {"hidden_size": 1024, "intermediate_size": 2048, "vocab_size": 24000, "num_hidden_layers": 2}
NAMES = ("first", "second")
FLAGS = ("--device", "cpu", "--dtype", "float32", "--max-context", "512", "--limit-worker-concurrency", "4")
ENGINE = EngineSpec(device="cpu", dtype="float32", max_context=512, max_running=4)
UNLIMITED = DeviceMemory("cpu", 2**40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("turns")
    return [
        write_checkpoint(root / name, "llama", seed=seed, dtype=torch.bfloat16, config=SIZES)
        for seed, name in enumerate(NAMES)
    ]


@pytest.fixture(scope="module")
def planned(folders):
    return [PlannedModel.of(Checkpoint.open(folder), folder.name) for folder in folders]


def answer(client, name, number):
    """The greedy ids of one short completion."""
    outcome = client.completions.create(
        model=name,
        prompt=[10 + number % 7, 11, 12, 13],
        max_tokens=6,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    return outcome.choices[0].token_ids


def client_of(worker):
    return openai.OpenAI(base_url=worker.url + "/v1", api_key=TOKEN, max_retries=0, timeout=120)


def served(folders, state_dir, *flags):
    models = [part for folder in folders for part in ("--model-path", str(folder))]
    environment = {"FASTCHAT_CLUSTER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    arguments = [*models, "--port", "0", "--no-register", *FLAGS, *flags]
    return start_command("multi_model_worker", *arguments, state_dir=state_dir, environment=environment)


def test_models_that_do_not_fit_together_answer_in_turn(tmp_path, folders, planned):
    """40 alternating requests: every answer is what the model says with all the room there is, within the budget."""
    together = plan_memory(planned, ENGINE, UNLIMITED)
    alone = plan_memory(planned[:1], ENGINE, UNLIMITED)
    budget = (together.least_bytes + alone.total_bytes) // 2
    with served(folders, tmp_path / "roomy") as roomy, client_of(roomy) as client:
        expected = {name: [answer(client, name, number) for number in range(7)] for name in NAMES}
    assert expected["first"] != expected["second"]
    with (
        served(folders, tmp_path / "narrow", "--memory", str(budget)) as narrow,
        peak_of(narrow.pid) as peak,
        client_of(narrow) as client,
    ):
        for number in range(4):
            assert answer(client, NAMES[number % 2], number) == expected[NAMES[number % 2]][number % 7]
        with ThreadPoolExecutor(8) as pool:
            asked = [(NAMES[n % 2], n, pool.submit(answer, client, NAMES[n % 2], n)) for n in range(36)]
            for name, number, outcome in asked:
                assert outcome.result() == expected[name][number % 7]
        assert {model.id for model in client.models.list()} == set(NAMES)
        log = narrow.log
    assert "the models take turns in memory" in log
    assert log.count("model asleep") >= 4
    assert peak[0] <= budget


def test_as_many_as_fit_are_planned_to_be_awake_at_once(planned):
    """Three of a kind with room for two; none where not even one fits."""
    three = [*planned, planned[0]]
    two = plan_memory(planned, ENGINE, UNLIMITED)
    roomy = plan_turns(three, ENGINE, DeviceMemory("cpu", int(two.total_bytes / 0.9) + 2**30))
    assert roomy is not None
    assert roomy.num_awake == 2
    assert sum(share.total_bytes for share in roomy.shares[:2]) + roomy.process_bytes <= roomy.budget.num_bytes
    assert plan_turns(three, ENGINE, DeviceMemory("cpu", 2**29)) is None
