"""What the laws of the terminal share: a small model, a running system that serves it, and doubles of both sides."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from fastchat.terminal.screen import Screen
from fastchat.terminal.session import ChatSession, SessionConfig
from fastchat.terminal.talker import Talker
from tests.checkpoints import write_checkpoint
from tests.system import MODEL_NAME, running_system

LONG_CONTEXT = 8192
ENGINE_FLAGS = ("--device", "cpu", "--dtype", "float32", "--kv-cache-memory", "32MiB")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A small ChatGLM2 with room for a long answer."""
    return write_checkpoint(
        tmp_path_factory.mktemp("models") / MODEL_NAME, "chatglm2", config={"seq_length": LONG_CONTEXT}
    )


@pytest.fixture(scope="session")
def system(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("terminal")
    flags = ("--model-path", model_folder, *ENGINE_FLAGS)
    with running_system(folder, worker_flags=flags) as running:
        yield running


class ScriptedTalker(Talker):
    """Implements `Talker`: `script(body)` gives the events of an answer or raises."""

    model_name = "scripted"
    template_name = "chatglm2"
    roles = ("问", "答")

    def __init__(self, script: Callable[[dict], list[bytes]]) -> None:
        self.bodies: list[dict] = []
        self._script = script

    async def start(self):
        """Nothing to start."""

    async def close(self):
        """Nothing to close."""

    async def prompt_of(self, question):
        return "\n".join(message["content"] for message in question.messages())

    @asynccontextmanager
    async def _open(self, body) -> AsyncIterator[AsyncIterator[bytes]]:
        self.bodies.append(body)

        async def events():
            for event in self._script(body):
                yield event

        yield events()


class TypedScreen(Screen):
    """Implements `Screen`: types the given lines, remembers what was shown."""

    def __init__(self, lines):
        self._lines = list(lines)
        self.shown = ""
        self.notices: list[str] = []

    def ask(self, role):
        if not self._lines:
            raise EOFError
        line = self._lines.pop(0)
        if isinstance(line, BaseException):
            raise line
        self.shown += f"{role}: {line}\n"
        return line

    def begin_answer(self, role):
        self.shown += f"{role}: "

    def write(self, text):
        self.shown += text

    def end_answer(self):
        self.shown += "\n"

    def notice(self, text):
        self.notices.append(text)


@pytest.fixture
def talk():
    """Run a session over typed lines; gives back the talker and the screen."""

    def run(lines, script, **config):
        talker, screen = ScriptedTalker(script), TypedScreen(lines)
        with asyncio.Runner() as runner:
            ChatSession(talker, screen, SessionConfig(**config), runner.run).run()
        return talker, screen

    return run
