"""`fastchat serve` with more models than fit at once."""

import json
import urllib.request

from fastchat.models.checkpoint import Checkpoint
from fastchat.serve.launch import create_serve_parser
from fastchat.serve.worker_arguments import engine_spec
from fastchat.worker.device_memory import DeviceMemory
from fastchat.worker.memory_plan import plan_memory
from fastchat.worker.model_needs import PlannedModel
from tests.checkpoints import write_checkpoint
from tests.serve.test_launch import Serving


def test_models_that_do_not_fit_together_take_turns_in_one_worker(tmp_path):
    """Instead of a refusal: both answer, and only one is in memory at a time."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 40000, "num_hidden_layers": 1}
    folders = [write_checkpoint(tmp_path / name, "llama", config=sizes) for name in ("one", "two")]
    arguments = ["--dtype", "float32", "--max-context", "512", "--limit-worker-concurrency", "2", "--device", "cpu"]
    models = [word for folder in folders for word in ("--model-path", str(folder))]
    asked = create_serve_parser().parse_args([*models, *arguments])
    engine = engine_spec(asked, max_running=2)
    planned = [PlannedModel.of(Checkpoint.open(folder), folder.name) for folder in folders]
    unlimited = DeviceMemory("cpu", 2**40)
    budget = plan_memory(planned, engine, unlimited).least_bytes - 64 * 2**20
    with Serving(tmp_path / "state", *models, *arguments, "--memory", str(budget), "--pin", "two") as serving:
        assert serving.wait(limit_s=60) == 2
        assert "one needs" in serving.log.splitlines()[-1]
    with Serving(tmp_path / "state", *models, *arguments, "--memory", str(budget)) as serving:
        serving.wait_for_line("Ctrl-C stops everything")
        assert serving.log.count('process started process="worker of') == 1
        for name in ("one", "two", "one"):
            assert serving.answer(name, ignore_eos=True) is not None
            with urllib.request.urlopen(serving.api_url + "/api/v1/models") as answer:
                states = {row["id"]: row["state"] for row in json.load(answer)["data"]}
            assert states == {"one": "asleep", "two": "asleep"} | {name: "awake"}
        assert "take turns in memory" in serving.log
