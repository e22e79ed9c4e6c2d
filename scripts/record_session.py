"""Records docs/terminal-session.md: the guide's session with the bundled demo model, as it stood on the screen.

python scripts/record_session.py

Everything runs for real, on the usual ports and in an empty home folder, on terminals of its own. The guide's program
runs with openai 0.28.1, in an environment that `scripts/test_clients.py` makes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastchat.serve.demo_model import find_demo_model  # noqa: E402 - works where the package is not installed
from scripts.test_clients import CLIENTS, guide_program, make_environment  # noqa: E402 - scripts are no package
from tests.terminal.pty_session import CTRL_C, Terminal  # noqa: E402 - the tests are no installed package

PAGE = ROOT / "docs" / "terminal-session.md"
MODEL = "chatglm2-demo"
PORTS = (8000, 21001, 21002)
NUM_COLUMNS = 120
READY = r"Uvicorn running on http\S+ \(Press CTRL\+C to quit\)"
PROMPT = "$ "

INTRODUCTION = f"""# A terminal session, as it stood on the screen

Written by `python scripts/record_session.py`: the steps of [the guide](guide.md), run for real. The model is the tiny
one that comes with the package, in the folder `models/{MODEL}`; with your own checkpoint the commands are the same.

下面是按照[指南](guide.zh-CN.md)的步骤实际运行的记录，由 `python scripts/record_session.py` 写成。
所用模型是随软件包附带的微型演示模型，放在 `models/{MODEL}`；换成自己的模型，命令完全一样。
"""

CURLS = (
    "curl http://localhost:8000/v1/models",
    """curl http://localhost:8000/v1/chat/completions \\
  -H "Content-Type: application/json" \\
  -d '{"model": "chatglm2-demo", "messages": [{"role": "user", "content": "Hello! What is your name?"}]}'""",
    """curl http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{"model": "chatglm2-demo", "prompt": "Once upon a time", "max_tokens": 41, "temperature": 0.5}'""",
    """curl -s http://localhost:8000/v1/embeddings \\
  -H "Content-Type: application/json" \\
  -d '{"model": "chatglm2-demo", "input": "Hello world!"}' | head -c 150""",
    """curl http://localhost:8000/v1/completions \\
  -H "Content-Type: application/json" \\
  -d '{"model": "vicuna-7b-v1.3", "prompt": "Once upon a time", "max_tokens": 41, "temperature": 0.5}'""",
)


class Desk:
    """A folder with the model in it, and terminals that begin there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "home").mkdir()
        (folder / "work" / "models").mkdir(parents=True)
        shutil.copytree(find_demo_model(), self.work / "models" / MODEL)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")  # of the built kernels
        self._environment = {"HOME": str(folder / "home"), "XDG_CACHE_HOME": cache, "PATH": path}

    @property
    def work(self) -> Path:
        return self._folder / "work"

    def open(self, command: str, **environment: str) -> Terminal:
        """A terminal in which the command was typed."""
        return Terminal(
            ["/bin/bash", "-c", command],
            environment=self._environment | environment,
            cwd=self.work,
            num_columns=NUM_COLUMNS,
        )

    def run(self, command: str, **environment: str) -> str:
        """The command and what it showed, to its end."""
        with self.open(command, **environment) as terminal:
            code = terminal.wait()
            if code:
                raise SystemExit(f"exit code {code}: {command}\n{terminal.screen}")
        return shown(command, terminal)


def main() -> None:
    """Record everything, then write the page."""
    for port in PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                raise SystemExit(f"port {port} is in use; stop what listens there, for the session needs it")
    with tempfile.TemporaryDirectory() as folder:
        page = "\n".join([INTRODUCTION, *sections(Desk(Path(folder)))])
        for private in (folder, str(ROOT), str(Path.home()), socket.gethostname()):
            assert private not in page, f"the session shows {private}"
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} is written")


def sections(desk: Desk) -> Iterator[str]:
    """The parts of the page."""
    inspected = desk.run(f"fastchat models inspect models/{MODEL}")
    yield section("What is in the folder", "文件夹里有什么", inspected)
    yield section("A chat without a server", "不用服务器的对话", chat(desk))
    with three_windows(desk) as windows:
        calls = "\n".join(desk.run(command) for command in CURLS)
        program = guide(desk)
    notes = ("Three windows, from their start to Ctrl-C", "三个窗口，从启动到 Ctrl-C")
    yield section(*notes, *(shown(command, window) for command, window in windows.items()))
    yield section("Calls with curl, meanwhile", "期间用 curl 调用", calls)
    yield section("The guide's program with openai 0.28.1", "用 openai 0.28.1 运行指南中的程序", program)


def chat(desk: Desk) -> str:
    """The guide's two questions, a saved conversation, and the end."""
    command = f"python3 -m fastchat.serve.cli --model-path models/{MODEL}"
    with desk.open(command) as terminal:
        for line in ("你是谁？", "如何使用fastchat", "!!save talk", "!!exit"):
            terminal.wait_for("(^|\n)问: ")
            terminal.type(line + "\n")
        assert terminal.wait() == 0, terminal.screen
    return shown(command, terminal)


@contextmanager
def three_windows(desk: Desk) -> Iterator[dict[str, Terminal]]:
    """Controller, worker and API server by their commands, ready; ended with Ctrl-C in the opposite order."""
    commands = (
        "python3 -m fastchat.serve.controller",
        f"python3 -m fastchat.serve.model_worker --model-path models/{MODEL}",
        "python3 -m fastchat.serve.openai_api_server --host localhost --port 8000",
    )
    with ExitStack() as stack:
        windows = {}
        for command in commands:
            windows[command] = stack.enter_context(desk.open(command))
            windows[command].wait_for(READY)
        windows[commands[1]].wait_for("registered with the controller")
        desk.run("until curl -fs http://localhost:8000/health; do sleep 0.1; done")
        yield windows
        for window in reversed(windows.values()):
            window.type(CTRL_C)
            assert window.wait() == 0, window.screen


def guide(desk: Desk) -> str:
    """`examples/chatglm.py` with the demo model's name."""
    (client,) = (client for client in CLIENTS if client.name == "openai-0.28.1")
    program = guide_program(desk.work, "http://localhost:8000")
    program.write_text(program.read_text(encoding="utf-8").replace("chatglm2-6b", MODEL), encoding="utf-8")
    return desk.run("python chatglm.py", PATH=f"{make_environment(client).parent}{os.pathsep}{os.environ['PATH']}")


def section(english: str, chinese: str, *screens: str) -> str:
    """A heading and what stood on each screen."""
    return f"## {english} · {chinese}\n\n" + "\n".join(f"````text\n{screen}````\n" for screen in screens)


def shown(command: str, terminal: Terminal) -> str:
    """The typed command and the screen; of a line that was written over, the last state."""
    lines = terminal.screen.split("\n")
    last = [re.sub(r".*\r(?=.)", "", line).replace("\r", "").rstrip() for line in lines]
    return f"{PROMPT}{command}\n" + "\n".join(last).strip("\n") + "\n"


if __name__ == "__main__":
    main()
