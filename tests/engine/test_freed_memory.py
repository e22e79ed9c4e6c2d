"""What models held is not kept by the C library."""

import subprocess
import sys

import pytest

PIECES = """
from pathlib import Path
from fastchat.engine.freed_memory import give_back_freed_memory

def held():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))

b"x" * (31 << 20)  # once freed, pieces up to this size come from the heap
before = held()
pieces = [b"x" * (8 << 20) for _ in range(8)]
above = b"x" * (1 << 20)  # the heap cannot shrink from its end
del pieces
give_back_freed_memory()
print(held() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_freed_pieces_below_others_go_back():
    answer = subprocess.run([sys.executable, "-c", PIECES], capture_output=True, text=True, check=True, timeout=60)
    assert int(answer.stdout) < 16 << 20
