"""LoRA and P-tuning through one command: from the start and while it runs."""

import json
import urllib.request

from tests.adapters import modules_of, write_lora
from tests.checkpoints import write_checkpoint
from tests.processes import run_command
from tests.serve.test_launch import Serving
from tests.worker.test_prefix_tuning import write_prefix


def test_a_base_with_lora_and_prefix_and_one_more_while_it_runs(tmp_path):
    """Each name answers as its own model; what is added answers after the command, what is removed is gone."""
    base = write_checkpoint(tmp_path / "chatglm2-6b", "chatglm2")
    folder = tmp_path / "adapters"
    write_lora(folder / "lora", base, modules_of("chatglm2"))
    write_prefix(folder / "prefix", base)
    write_lora(folder / "late", base, modules_of("chatglm2"), seed=2)
    models = [base, f"{base}+{folder / 'lora'}", f"{base}+{folder / 'prefix'}"]
    flags = [word for model in models for word in ("--model-path", model)]
    sizes = ("--kv-cache-memory", "4MiB", "--limit-worker-concurrency", "4", "--device", "cpu", "--dtype", "float32")
    with Serving(tmp_path / "state", *flags, *sizes, "--adapter-dir", folder) as serving:
        serving.wait_for_line("Ctrl-C stops everything")
        assert serving.log.count('process started process="worker of') == 1

        def models_command(*words):
            result = run_command("models_command", *words, "--url", serving.api_url, state_dir=tmp_path)
            assert result.returncode == 0, result.stderr
            return result.stdout

        assert "chatglm2-6b +lora +prefix +added" in models_command("add-adapter", "chatglm2-6b", "added=late")
        names = ("chatglm2-6b", "lora", "prefix", "added")
        serving.answer_when_there("added")
        assert len({serving.answer(name, ignore_eos=True, max_tokens=24) for name in names}) == 4
        assert "lora" not in models_command("remove-adapter", "chatglm2-6b", "lora", "added")
        with urllib.request.urlopen(serving.api_url + "/api/v1/models") as answer:
            (row,) = json.load(answer)["data"]
        assert row["adapters"] == ["prefix"]
