"""A command on a real pseudo-terminal: what a person types, what they see, and Ctrl-C as the terminal sends it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.processes import process_environment

LIMIT_S = 120.0
CTRL_C = "\x03"
CTRL_D = "\x04"

# Makes the terminal on standard input the controlling one, so that its Ctrl-C becomes a signal, and runs the command.
_LAUNCHER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07]*\x07|[=>])")


class Terminal:
    """A command on a terminal. As a context it is killed at the end."""

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        num_columns: int = 100,
    ) -> None:
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, num_columns, 0, 0))
        extra = {"TERM": "dumb", "LANG": "C.UTF-8", "PROMPT_TOOLKIT_NO_CPR": "1", **(environment or {})}
        self.process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCHER, *map(str, command)],
            cwd=cwd,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=process_environment(extra),
            start_new_session=True,
        )
        os.close(slave)
        self._raw = b""
        self._read_up_to = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self._master)

    @property
    def screen(self) -> str:
        """All that was shown so far, without colours and cursor movements."""
        return _ESCAPES.sub("", self._raw.decode(errors="replace")).replace("\r\n", "\n")

    def type(self, text: str) -> None:
        """Press keys; `\\n` is Enter."""
        os.write(self._master, text.replace("\n", "\r").encode())

    def wait_for(self, pattern: str) -> re.Match[str]:
        """What matches first behind the last match. Fails when it does not come."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            match = re.compile(pattern).search(self.screen, self._read_up_to)
            if match is not None:
                self._read_up_to = match.end()
                return match
            assert self._read(deadline - time.monotonic()), f"no {pattern!r} on the screen:\n{self.screen}"

    def press_until_end(self, key: str) -> int:
        """Press a key until the program ends; the exit code. Between two prompts a terminal swallows what is typed."""
        deadline = time.monotonic() + LIMIT_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # it has just ended
                self.type(key)
            pause_ends = time.monotonic() + 0.5
            while self._read(pause_ends - time.monotonic()):
                pass
        return self.wait()

    def wait(self) -> int:
        """Read to the end; the exit code."""
        while self._read(LIMIT_S):
            pass
        return self.process.wait(LIMIT_S)

    def _read(self, limit_s: float) -> bool:
        """Take what is there; False at the end, or where nothing comes in time."""
        if limit_s <= 0 or not select.select([self._master], [], [], limit_s)[0]:
            return False
        try:
            received = os.read(self._master, 65536)
        except OSError:  # Linux says so where the other side has closed the terminal
            return False
        self._raw += received
        return bool(received)


class PtySession(Terminal):
    """`python -m <module> flags` on a terminal."""

    def __init__(self, module: str, *flags: str | Path, environment: Mapping[str, str] | None = None) -> None:
        super().__init__([sys.executable, "-m", module, *flags], environment=environment)
