"""Start a real process of ours, wait for what it says and not for luck, collect its log, and stop it for sure."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[1]
RUNNING = re.compile(r"Uvicorn running on (https?)://(\S+):(\d+) ")
START_LIMIT_S = 180.0
STOP_LIMIT_S = 60.0


class ServerProcess:
    """One process with its log. As a context it is stopped at the end, with all that it started."""

    def __init__(
        self, command: Sequence[str | Path], *, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._has_ended = False
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=cwd,
            env=process_environment(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # one group, so that children die with it
        )
        self._reader = threading.Thread(target=self._read, name=f"log of {self.process.pid}", daemon=True)
        self._reader.start()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def log(self) -> str:
        """All that it has written so far, stdout and stderr together."""
        with self._news:
            return "\n".join(self._lines)

    @property
    def url(self) -> str:
        """Where it listens, as 127.0.0.1; known after its ready line."""
        match = self.wait_for_line(RUNNING, limit_s=START_LIMIT_S)
        host = match[2] if match[1] == "https" else "127.0.0.1"
        return f"{match[1]}://{host}:{match[3]}"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.url.rpartition(":")[2])

    def wait_for_line(self, pattern: str | re.Pattern[str], *, limit_s: float = START_LIMIT_S) -> re.Match[str]:
        """The first line, old or new, that holds `pattern`. Fails when it does not come or the process ends."""
        deadline = time.monotonic() + limit_s
        seen = 0
        with self._news:
            while True:
                for line in self._lines[seen:]:
                    if match := re.search(pattern, line):
                        return match
                seen = len(self._lines)
                left_s = deadline - time.monotonic()
                if self._has_ended or left_s <= 0 or not self._news.wait(left_s):
                    why = "the process ended" if self._has_ended else f"nothing within {limit_s:.0f} s"
                    text = "\n".join(self._lines)
                    raise AssertionError(f"no line with {pattern!r}: {why}; its log:\n{text}")

    def send_line(self, text: str) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process alone."""
        self.process.send_signal(number)

    def wait(self, *, limit_s: float = STOP_LIMIT_S) -> int:
        """Wait for its end; returns the exit code, negative for a signal."""
        code = self.process.wait(limit_s)
        self._reader.join(limit_s)
        return code

    def kill(self) -> None:
        """SIGKILL to the process alone, as a crash would end it."""
        self.process.kill()
        self.process.wait(STOP_LIMIT_S)

    def stop(self) -> int:
        """End it: first asked, then forced, children too. Returns the exit code. May be called twice."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(STOP_LIMIT_S)
        self._kill_group()
        self._reader.join(STOP_LIMIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                with contextlib.suppress(BrokenPipeError):  # what was written to a process that had ended
                    pipe.close()
        return self.process.returncode

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self._lines.append(line.rstrip("\n"))
                self._news.notify_all()
        with self._news:
            self._has_ended = True
            self._news.notify_all()


def start_command(
    module: str, *flags: str | Path, state_dir: Path, environment: Mapping[str, str] | None = None
) -> ServerProcess:
    """`python3 -m fastchat.serve.<module>` with its own state directory; does not wait until it is ready.

    Give `--port 0` for a free port and ask `url` or `port` of the result, which wait for the ready line.
    """
    return ServerProcess(
        [sys.executable, "-m", f"fastchat.serve.{module}", *flags],
        environment={"FASTCHAT_STATE_DIR": str(state_dir), **(environment or {})},
    )


def run_command(
    module: str, *flags: str | Path, state_dir: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that is expected to end by itself, such as one with a wrong flag."""
    return subprocess.run(
        [sys.executable, "-m", f"fastchat.serve.{module}", *map(str, flags)],
        cwd=ROOT,
        env=process_environment({"FASTCHAT_STATE_DIR": str(state_dir), **(environment or {})}),
        capture_output=True,
        text=True,
        timeout=START_LIMIT_S,
        check=False,
    )


def free_port() -> int:
    """A port for a process that must come back on the same one, or on which nobody is to listen.

    It stays bound here, for good, without being listened on: the kernel gives it to nobody who asks for any port, and
    whoever names it may listen there, with SO_REUSEADDR as every server of ours.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    port: int = holder.getsockname()[1]
    holder.detach()  # open until this process ends
    return port


def process_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without our own variables, importing the package from this tree."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FASTCHAT_")}
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **(extra or {})}
