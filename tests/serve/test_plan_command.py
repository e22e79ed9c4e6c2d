"""`fastchat plan`: its exit code is the verdict, its JSON the figures; what a worker would refuse is one clear line."""

import json
import struct
import subprocess
import sys

import pytest
import torch

from fastchat.errors import CheckpointError, ConfigError
from fastchat.serve.arguments import exit_code_of
from fastchat.serve.plan_command import main
from tests.checkpoints import write_checkpoint, write_hollow_checkpoint
from tests.processes import ROOT, process_environment
from tests.worker.test_memory_plan import CHATGLM2_6B


@pytest.fixture(scope="module")
def real_shape(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "chatglm2-6b"
    return write_hollow_checkpoint(folder, "chatglm2", dtype=torch.float16, config=CHATGLM2_6B)


def as_json(capsys, *arguments):
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_what_fits_is_0_and_what_does_not_is_1(real_shape, capsys):
    """With the figures of each model and, where it does not fit, of the command that does."""
    code, facts = as_json(capsys, real_shape, "--memory", "20GiB", "--dtype", "bfloat16")
    assert (code, facts["fits"], facts["remedy"]) == (0, True, None)
    (model,) = facts["models"]
    assert f"{model['weight_bytes'] / 1e9:.2f}" == "12.49"
    assert model["kv_cache_tokens"] * model["kv_cache_bytes_per_token"] == model["kv_cache_bytes"]
    assert facts["least_bytes"] <= facts["total_bytes"] <= facts["budget_bytes"] == 20 * 2**30
    code, facts = as_json(capsys, real_shape, real_shape, "--max-gpu-memory", "24GiB")
    assert (code, facts["fits"], facts["device"]) == (1, False, "cuda")
    assert facts["remedy"]["flags"] == "--quantize int8"
    assert facts["remedy"]["total_bytes"] <= 24 * 2**30
    assert "(16.07 GB (14.97 GiB)). As it is, they are served in turns: 1 in memory" in facts["verdict"]
    assert facts["num_in_turns"] == 1
    code, facts = as_json(capsys, real_shape, "--memory", "1GB")
    assert (code, facts["num_in_turns"]) == (1, 0)
    assert "turns" not in facts["verdict"]


def test_person_reads_the_same(real_shape, capsys):
    assert main([str(real_shape), "--memory", "20GiB", "--dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "12.49 GB" in text
    assert "28,672 bytes" in text
    assert text.endswith("\nit fits\n")
    assert main([str(real_shape), "--memory", "1GB"]) == 1
    assert "chatglm2-6b needs at least" in capsys.readouterr().out.splitlines()[-1]


def test_room_for_later_adapters_is_part_of_the_plan(real_shape, capsys):
    flags = (real_shape, "--memory", "20GiB", "--dtype", "bfloat16")
    _, without = as_json(capsys, *flags)
    _, facts = as_json(capsys, *flags, "--adapter-memory", "1GB")
    assert facts["models"][0]["adapter_reserve_bytes"] == 10**9
    assert facts["least_bytes"] == without["least_bytes"] + 10**9
    main([*map(str, flags), "--adapter-memory", "1GB"])
    assert "1.00 GB  kept free for those added later" in capsys.readouterr().out


def test_workers_of_their_own_take_their_own_libraries(real_shape, capsys):
    flags = (real_shape, real_shape, "--memory", "40GiB", "--dtype", "bfloat16")
    _, together = as_json(capsys, *flags)
    _, apart = as_json(capsys, *flags, "--one-worker-each")
    assert apart["process_bytes"] > together["process_bytes"]
    just_together = (*flags[:2], "--dtype", "bfloat16", "--memory", f"{together['least_bytes']}B", "--one-worker-each")
    code, facts = as_json(capsys, *just_together)
    assert code == 1
    assert facts["verdict"].endswith("As it is, one worker holds all of them.")


def break_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 50) + b"{" * 50)


def negative_shape(folder):
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def no_attention(folder):
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (break_header, "truncated or damaged"),
        (negative_shape, "header cannot be read"),
        (no_attention, "the weights lack"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    ],
)
def test_damaged_folder_is_one_line(tmp_path, damage, reason):
    """The words of the loader, and its exit code."""
    folder = write_checkpoint(tmp_path / "model", "llama", num_shards=1)
    damage(folder)
    with pytest.raises(CheckpointError, match=reason) as error:
        main([str(folder)])
    assert "\n" not in error.value.message
    assert exit_code_of(error.value) == 2


def test_contradicting_flags_are_refused(real_shape):
    with pytest.raises(ConfigError, match="--memory says nothing here"):
        main([str(real_shape), "--memory", "1GB", "--max-gpu-memory", "1GB"])


def test_no_weight_is_read_and_no_torch_loaded(real_shape):
    """A plan for twelve gigabytes takes a moment."""
    program = (
        "import sys; from fastchat.serve.plan_command import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(real_shape), "--device", "cpu"],
        cwd=ROOT,
        env=process_environment(),
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    assert result.stdout.splitlines()[-1] == "False False"
