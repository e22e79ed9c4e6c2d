"""`fastchat models inspect`: true figures, the loader's own refusals, without torch."""

import json
import subprocess
import sys

import pytest
import torch

from fastchat.errors import CheckpointError
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.inspection import inspect_checkpoint
from fastchat.models.weights import load_model
from fastchat.serve.arguments import exit_code_of
from fastchat.serve.convert_command import main as convert
from fastchat.serve.models_command import main
from fastchat.serve.sizes import size_text
from tests.checkpoints import FAMILIES, write_checkpoint
from tests.models.test_official_quantized import write_both
from tests.processes import ROOT, process_environment


@pytest.mark.parametrize("layout", ["bin", "safetensors"])
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_loaded_model(tmp_path, family, layout):
    """Parameters from headers alone, with the types that are in them; the cache as transformers' config has it."""
    folder = write_checkpoint(tmp_path / family, family, layout=layout, dtype=torch.bfloat16, num_shards=2)
    inspection = inspect_checkpoint(Checkpoint.open(folder))
    model = load_model(Checkpoint.open(folder), dtype="float32", on_progress=lambda *_: None)
    assert inspection.footprint.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert inspection.footprint.dtypes == ("bfloat16",)
    assert inspection.footprint.num_shards == 2
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * head_size
    assert inspection.footprint.cache_bytes("float16", 10) == values * 2 * 10


def test_json_has_what_a_program_asks(model_folder, capsys):
    assert main(["inspect", str(model_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["name"], facts["family"], facts["max_context"]) == ("chatglm2-6b", "chatglm", 32768)
    assert facts["prompt_format"]["name"] == "chatglm2"
    assert facts["prompt_format"]["roles"] == ["问", "答"]
    assert "[Round 1]" in facts["prompt_format"]["example"]
    assert facts["prompt_format"]["stop_tokens"] == {"2": "</s>"}
    assert facts["weights"]["layout"] == "bin"
    assert facts["sampling_defaults"]["temperature"] == 0.7
    memory = facts["memory"]["float32"]
    assert memory["weights"] == 4 * facts["num_parameters"]
    assert memory["kv_cache_full_context"] == 32768 * memory["kv_cache_per_token"]


def test_person_reads_the_same_without_torch(model_folder):
    """A fresh process: quick, and nothing heavy is imported."""
    program = (
        "import sys; from fastchat.serve.models_command import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules, code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, "inspect", str(model_folder)],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    *_, last = result.stdout.splitlines()
    assert last == "False False 0"
    assert "chatglm2 (from _name_or_path in config.json" in result.stdout
    assert "32,768 tokens" in result.stdout
    assert "bytes of KV cache per token" in result.stdout


def break_config(folder):
    (folder / "config.json").unlink()


def quantize(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_bit": 3}))


def cut_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def lose_shard(folder):
    sorted(folder.glob("*.safetensors"))[0].unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_config, "no config.json"),
        (quantize, "quantization_bit is 3"),
        (cut_shard, "truncated"),
        (lose_shard, "missing"),
        (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer"),
    ],
)
def test_folder_that_cannot_be_loaded_is_exit_code_2_with_one_line(tmp_path, capsys, damage, reason):
    """The words of the loader."""
    folder = write_checkpoint(tmp_path / "chatglm2-6b", "chatglm2")
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as error:
        main(["inspect", str(folder)])
    assert exit_code_of(error.value) == 2
    assert "\n" not in error.value.message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0 bytes"), (1023, "1,023 bytes"), (12487168064, "11.63 GiB"), (2**20, "1.00 MiB")]
)
def test_sizes_are_for_reading(num_bytes, text):
    assert size_text(num_bytes) == text


@pytest.mark.parametrize("bits", [8, 4])
def test_official_quantized_folder_is_told_truly(tmp_path, capsys, bits):
    """As many parameters as the plain one, and the memory that loading really takes."""
    for folder in write_both(tmp_path, bits, "bin"):
        assert main(["inspect", str(folder), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        model = load_model(Checkpoint.open(folder), dtype="bfloat16")
        held = sum(value.numel() * value.element_size() for value in model.parameters())
        assert told["memory"]["bfloat16"]["weights"] == pytest.approx(held, rel=0.1)  # rows are filled up
        assert told["weights"]["quantized_as"] == (f"int{bits}" if folder.name == "official" else None)
        plain = load_model(Checkpoint.open(tmp_path / "plain"))
        assert told["num_parameters"] == sum(value.numel() for value in plain.parameters())


@pytest.mark.parametrize("family", ["chatglm2", "qwen2"])
@pytest.mark.parametrize("flags", [["--load-8bit"], ["--quantize", "int4"]], ids=str)
def test_converted_folder_is_told_truly(tmp_path, capsys, family, flags):
    """Sizes that fill whole units: then the counts are exact. A tied head is a copy of its own in memory."""
    sizes = {"hidden_size": 64, "ffn_hidden_size": 128, "intermediate_size": 128, "head_dim": 16}
    source = write_checkpoint(tmp_path / "chatglm2-6b", family, config=sizes)
    assert convert([str(source), str(tmp_path / "small"), *flags]) == 0
    capsys.readouterr()
    assert main(["inspect", str(source), "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(tmp_path / "small"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    model = load_model(Checkpoint.open(tmp_path / "small"), dtype="bfloat16")
    held = sum(value.numel() * value.element_size() for value in model.parameters())
    assert told["memory"]["bfloat16"]["weights"] == held
    assert told["num_parameters"] == plain["num_parameters"]
    assert told["weights"]["quantized_as"] == model.held_as
    assert main(["inspect", str(tmp_path / "small")]) == 0
    assert f"the Linears are {model.held_as} on disk" in capsys.readouterr().out
