"""One engine in a process of its own, which takes turns with others: only one of them runs at any moment.

An engine whose turn is over is stopped by a signal, all its threads: an idle engine that spins on a core would slow the
next one many times over. Its memory stays, so it need not load again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SAMPLING_S = 0.1
LEAVING_S = 20


@dataclass(frozen=True)
class Entry:
    """What to start: a name for tables, and the command with its environment."""

    engine: str
    weights: str
    command: Sequence[str]
    variables: Mapping[str, str]

    @property
    def name(self) -> str:
        """For tables and files."""
        return f"{self.engine} {self.weights}"


class Contestant:
    """A started engine. `facts` is what it says of itself (`peers/turn.py`)."""

    def __init__(self, entry: Entry, log_folder: Path, first_turn: Mapping[str, int]) -> None:
        """Start it and wait for its first token. Raises `ChildProcessError`."""
        self.entry = entry
        self.log = log_folder / f"{entry.name.replace(' ', '-')}.log"
        began = time.perf_counter()
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                entry.command,
                env={**os.environ, **entry.variables},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        self._peak = _PeakMemory(self._process.pid)
        self._write(first_turn)
        self.facts: dict[str, Any] = self._read()  # Any: JSON
        self._read()
        self.first_token_s = time.perf_counter() - began
        self.starting_peak_bytes = self._peak.num_bytes
        self._signal(signal.SIGSTOP)

    @property
    def peak_bytes(self) -> int:
        """The most anonymous memory that was seen."""
        return self._peak.num_bytes

    def turn(self, **what: int) -> dict[str, Any]:  # Any: JSON
        """One turn's figures; the engine is awake only while it takes it. Raises `ChildProcessError`."""
        self._signal(signal.SIGCONT)
        try:
            self._write(what)
            return self._read()
        finally:
            self._signal(signal.SIGSTOP)

    def leave(self) -> None:
        """End it, by its own end of input first."""
        self._peak.close()
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(LEAVING_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _write(self, what: Mapping[str, int]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None

    def _read(self) -> dict[str, Any]:  # Any: JSON
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> ChildProcessError:
        self._peak.close()
        self._process.wait()
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return ChildProcessError(f"{lines[-1] if lines else 'it ended'} (all of it in {self.log})")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended; reading from it says so
            os.killpg(self._process.pid, number)


class _PeakMemory:
    """Samples the anonymous memory of a process and its children."""

    def __init__(self, process_id: int) -> None:
        self.num_bytes = 0
        self._process_id = process_id
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLING_S):
            self.num_bytes = max(self.num_bytes, anonymous_bytes(self._process_id))

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


def anonymous_bytes(process_id: int) -> int:
    """Anonymous memory of a process and all below it, now; 0 for one that has ended."""
    folder = Path(f"/proc/{process_id}")
    try:
        lines = (folder / "status").read_text().splitlines()
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    own = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
    return own + sum(anonymous_bytes(int(child)) for child in children)
