"""Controls C05 to C07, C10 and C20: what our tree, a checkpoint, a path or a dependency could make us run or read."""

from __future__ import annotations

import ast
import json
import re
import struct
import subprocess
import sys
import sysconfig
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.processes import ROOT, process_environment, run_command
from tests.security.conftest import MODEL

PACKAGE = ROOT / "src" / "fastchat"
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "yaml", "pty", "commands"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "recv_pyobj", "yaml.load", "torch.hub.load"),
    *("os.killpg", "numpy.load", "np.load", "torch.jit.load", "importlib.reload"),
}
FLOORS = {
    "jinja2": (3, 1, 6),
    "starlette": (1, 3, 1),
    "h11": (0, 16),
    "orjson": (3, 11, 6),
    "transformers": (5, 10),
    "torch": (2, 10),
    "sentencepiece": (0, 2, 1),
}


def calls():
    """Every call in our tree: its file, its name, its node."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                yield path, ast.unparse(node.func), node


def test_c05_finding_g_finding_h_nothing_in_our_tree_runs_data():
    """No pickle, no eval, no shell, no kill by name; torch.load only as `weights_only`."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in names} & FORBIDDEN_MODULES, path
    for path, name, node in calls():
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert name not in FORBIDDEN_CALLS, path
        assert keywords.get("shell", "False") == "False", path
        assert name != "torch.load" or keywords.get("weights_only") == "True", path
        if name.startswith("subprocess.") or name.endswith("create_subprocess_exec"):
            assert "pkill" not in ast.unparse(node), path
        assert not name.endswith("create_subprocess_shell"), path


def safetensors(header) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


def tensor(start, end, dtype="F32"):
    return {"transformer.output_layer.weight": {"dtype": dtype, "shape": [1], "data_offsets": [start, end]}}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(struct.pack("<Q", 2**31) + b"{}", id="2 GB of header"),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", id="2^63 bytes of header"),
        pytest.param(safetensors(tensor(-4, 0)), id="negative"),
        pytest.param(safetensors(tensor(0, 2**63)), id="beyond the file"),
        pytest.param(safetensors(tensor(4, 0)), id="backward"),
        pytest.param(safetensors(tensor(0, 4, "NaN")), id="unknown type"),
        pytest.param(safetensors(b"[" * 100_000), id="deep"),
    ],
)
def test_c06_damaged_weights_are_refused_in_one_line(tmp_path, content):
    """By the command that looks at a folder; more such files are in tests/models/test_hostile_files.py."""
    folder = write_checkpoint(tmp_path / MODEL, "chatglm2", num_shards=1)
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(content)
    ended = run_command("models_command", "inspect", folder, state_dir=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: ")


def test_c07_finding_c_code_of_a_checkpoint_never_runs(cluster):
    """The model that this cluster serves names code of its own in `auto_map`: it is served, and that code never ran."""
    assert cluster.still_answers()
    assert not cluster.code_ran.exists()
    for path, _, node in calls():
        for keyword in node.keywords:
            assert keyword.arg != "trust_remote_code" or ast.unparse(keyword.value) == "False", path


@pytest.mark.parametrize("optimised", ["", "1"])
def test_c07_nor_when_assertions_are_off(cluster, tmp_path, optimised):
    """No check of ours is an assertion."""
    folder = cluster.state_dir.parent / MODEL
    ended = subprocess.run(
        [sys.executable, "-m", "fastchat.serve.models_command", "inspect", folder],
        env=process_environment({"PYTHONOPTIMIZE": optimised}),
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0
    assert not cluster.code_ran.exists()


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "/etc/passwd", "//etc/passwd"),
        *("file:///etc/passwd", "x%00.json", "C:\\windows\\win.ini", "..\\..\\x", "chatglm2-6b/../secret", "~root"),
    ],
)
def test_c10_a_name_is_never_a_path(cluster, name):
    """In the URL and in the body: it is compared with the served names and nothing else."""
    for path in (f"/v1/models/{name}", f"/{name}", f"/static/{name}"):
        answer = cluster.call(path)
        assert 400 <= answer.status < 500
        assert "root:" not in answer.text
    body = {"model": name, "prompt": "x"}
    assert cluster.call("/v1/completions", body).status == 404
    assert cluster.call("/v1/completions", {**body, "model": MODEL, "chat_template": name}).status in (200, 400)


def test_c10_no_client_s_word_reaches_the_file_system(cluster):
    """What the API server and the worker have open is what they had before names were asked for."""
    before = {process.pid: open_files(process) for process in (cluster.api, cluster.worker, cluster.controller)}
    for name in ("../cluster-token", str(cluster.state_dir / "cluster-token"), "file:///etc/passwd"):
        cluster.call("/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": name}]})
        cluster.call(f"/v1/models/{name}")
    for process in (cluster.api, cluster.worker, cluster.controller):
        assert open_files(process) <= before[process.pid] | {"api-keys.sqlite3-wal", "api-keys.sqlite3-shm"}


def open_files(process) -> set[str]:
    targets = []
    for link in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile, as the connection of the last request is
            targets.append(str(link.readlink()))
    return {Path(target).name for target in targets if target.startswith("/") and not target.startswith("/dev")}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().split()
    return {_canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_c20_every_dependency_is_pinned_above_its_known_bad_releases():
    """One exact release each; the floors are those of the advisories."""
    pinned = pins()
    assert all(pinned.values())
    for name, floor in FLOORS.items():
        assert tuple(int(part) for part in re.findall(r"\d+", pinned[name])[: len(floor)]) >= floor
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert {_canonical(re.match(r"[A-Za-z0-9_.-]+", each)[0]) for each in wanted} <= set(pinned)


def test_c20_no_dependency_runs_code_when_python_starts():
    """A `.pth` file with an import in it is how stolen releases began; the editable install's own is known."""
    folder = Path(sysconfig.get_paths()["purelib"])
    starting = [
        file.name
        for file in folder.glob("*.pth")
        if any(line.startswith(("import ", "import\t")) for line in file.read_text().splitlines())
    ]
    assert set(starting) <= {"distutils-precedence.pth", "_virtualenv.pth"}
