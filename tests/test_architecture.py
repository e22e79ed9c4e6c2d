"""The folder tree is the architecture: imports go one way, files stay small, processes load only what they need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fastchat"
LAYERS = [
    {"errors"},
    {"config"},
    {"native"},
    {"engine", "models", "ops", "cluster"},
    {"api"},
    {"worker", "gateway", "arena", "supervisor", "terminal", "web"},
    {"serve"},
]
RANK = {part: rank for rank, parts in enumerate(LAYERS) for part in parts}
ALLOWED_ROOTS = {
    "native": {"torch", "triton"},
    "engine": {"torch", "transformers", "tokenizers", "numpy"},
    "models": {"torch", "transformers", "tokenizers", "numpy", "safetensors", "sentencepiece", "jinja2", "tqdm"},
}
FORBIDDEN_CALLS = {"eval", "exec", "compile"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "httpx", "requests"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(module: str) -> str:
    """The second word of a dotted name: the part of the package."""
    words = module.split(".")
    return words[1] if len(words) > 1 else ""


def imported_names(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    """A part imports itself and the layers below it, never a neighbour and never upward."""
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    if own in {"__init__", "__main__"}:
        return
    for name in imported_names(path):
        root = name.split(".", maxsplit=1)[0]
        if root == "fastchat":
            part = part_of(name)
            assert part == own or not part or RANK[part] < RANK[own], f"{own} imports {name}"
        elif own in ALLOWED_ROOTS:
            assert root in ALLOWED_ROOTS[own] or root in sys.stdlib_module_names, f"{own} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_code_from_data(path):
    """Nothing here can turn bytes into running code, and no file grows past 400 lines."""
    source = path.read_text()
    assert source.count("\n") <= 400
    for name in imported_names(path):
        assert name.split(".", maxsplit=1)[0] not in FORBIDDEN_MODULES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS
            assert called not in {"os.system", "os.popen"}
            for keyword in node.keywords:
                assert keyword.arg not in {"shell", "trust_remote_code"} or ast.unparse(keyword.value) == "False"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)


MODEL_CODE = {"torch", "transformers", "tokenizers", "sentencepiece"}
SMALL_COMMANDS = [
    *("controller", "openai_api_server", "chat", "compare", "cli"),
    *("models_command", "votes_command", "plan_command", "launch"),
]
POLICY = [
    *("engine.sequence", "engine.sampling_params", "engine.scheduler", "engine.kv_cache", "engine.client"),
    *("engine.engine_config", "engine.process_client", "worker.memory_remedy", "api.protocol"),
]
IMPORTS = """
import importlib, sys
forbidden = set(sys.argv[1].split(","))
for name in sys.argv[2:]:
    importlib.import_module(name)
    if loaded := forbidden & {module.partition(".")[0] for module in sys.modules}:
        sys.exit(f"{name} loads {loaded}")
print(*sys.modules)
"""


def loaded_by(*modules: str, without: set[str]) -> set[str]:
    """What a fresh interpreter has loaded after importing these one after the other; none may bring what is named."""
    command = [sys.executable, "-c", IMPORTS, ",".join(without), *modules]
    ended = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


def test_processes_that_compute_nothing_never_load_torch():
    """The control plane and the API server stay small and start fast."""
    loaded_by(*(f"fastchat.serve.{name}" for name in SMALL_COMMANDS), without={*MODEL_CODE, "numpy"})


def test_the_page_computes_nothing():
    """Gradio brings numpy along; no model code comes with it, and nothing of ours but the client's side of the API."""
    loaded = loaded_by("fastchat.web.app", without=MODEL_CODE)
    ours = {part_of(name) for name in loaded if name.startswith("fastchat.")}
    assert ours <= {"errors", "config", "api", "web"}


def test_policy_is_torch_free():
    """Who runs next is decided without a tensor."""
    loaded_by(*(f"fastchat.{module}" for module in POLICY), without={"torch"})


def test_engine_and_models_need_no_web_packages():
    """They run where only torch, transformers, tokenizers and numpy are installed."""
    loaded_by(
        *("fastchat.engine.engine", "fastchat.engine.process_server", "fastchat.models.weights"),
        without={"fastapi", "starlette", "uvicorn", "aiohttp", "pydantic", "structlog", "orjson"},
    )
