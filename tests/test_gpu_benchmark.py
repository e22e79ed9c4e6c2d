"""The GPU's benchmark runs where there are torch and transformers and little else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu
web = {"fastapi", "starlette", "uvicorn", "aiohttp", "pydantic", "structlog", "orjson", "gradio"}
assert not web & {name.split(".")[0] for name in sys.modules}
sys.argv[1:] = []
gpu.main()
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_the_benchmark_says_so_in_one_line():
    """And needs no web package to say it."""
    outcome = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(BENCHMARKS)], capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == 1
    assert outcome.stderr == "there is no GPU on this machine: nothing was measured\n"
    assert outcome.stdout == ""
