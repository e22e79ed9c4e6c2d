"""One session at the terminal: reads a line, obeys or asks it, shows the answer, keeps the conversation.

Whatever goes wrong with an exchange, the conversation is afterwards what it was before it. It runs synchronously on
the main thread; only the answer itself runs on the event loop, where Ctrl-C cancels it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fastchat.config import expand_home
from fastchat.errors import ConfigError, FastChatError
from fastchat.terminal.commands import COMMANDS, Command, is_unknown_command, parse_command
from fastchat.terminal.conversation import Conversation, load_conversation, save_conversation
from fastchat.terminal.screen import Screen
from fastchat.terminal.talker import CONTEXT_CODE, Answered, AnswerOptions, Question, Talker

LATE_INTERRUPT_S = 0.5
"""A Ctrl-C that comes within this time after an answer was meant for the answer."""

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class SessionConfig:
    """What the flags ask of a session."""

    options: AnswerOptions = field(default_factory=AnswerOptions)
    system_message: str = ""
    has_history: bool = True
    is_debug: bool = False


class RunOnLoop(Protocol):
    """The type of `asyncio.Runner.run`."""

    def __call__(self, work: Coroutine[Any, Any, _Result], /) -> _Result:  # Any: as Coroutine's definition has it
        """Run `work` to its end; raises `KeyboardInterrupt` on Ctrl-C, which cancels it."""


class ChatSession:
    """`run` until the input ends, an empty line, `!!exit`, or Ctrl-C where nothing is typed."""

    def __init__(self, talker: Talker, screen: Screen, config: SessionConfig, run_on_loop: RunOnLoop) -> None:
        self._talker = talker
        self._screen = screen
        self._config = config
        self._run_on_loop = run_on_loop
        self._conversation = Conversation(config.system_message)
        self._unanswered: str | None = None  # a question whose answer failed, for !!regen
        self._answered_at = float("-inf")

    def __repr__(self) -> str:
        return f"<ChatSession {self._talker.model_name} {len(self._conversation.turns)} turns>"

    def run(self) -> None:
        """Read and answer."""
        while True:
            try:
                line = self._screen.ask(self._talker.roles[0])
            except EOFError:
                return
            except KeyboardInterrupt:
                self._screen.notice("")  # what follows begins on a line of its own
                if time.monotonic() - self._answered_at < LATE_INTERRUPT_S:
                    continue
                return
            command = parse_command(line)
            if not line.strip() or (command is not None and command.name == "!!exit"):
                return
            if is_unknown_command(line):
                self._screen.notice(f"there is no {line.strip()}; the commands are {', '.join(COMMANDS)}")
            elif command is None:
                self._exchange(self._conversation, line)
            else:
                self._obey(command)

    def _obey(self, command: Command) -> None:
        try:
            match command.name:
                case "!!reset":
                    self._conversation = Conversation(self._config.system_message)
                    self._unanswered = None
                    self._screen.notice("a new conversation begins")
                case "!!remove":
                    self._remove()
                case "!!regen":
                    self._regenerate()
                case "!!save":
                    self._save(command.argument)
                case "!!load":
                    self._load(command.argument)
        except ConfigError as error:
            self._screen.notice(error.message)

    def _remove(self) -> None:
        self._unanswered = None
        before, question = self._conversation.without_last_exchange()
        removes = before != self._conversation
        self._conversation = before
        self._screen.notice("the last exchange is removed" if removes and question else "there is nothing to remove")

    def _regenerate(self) -> None:
        if self._unanswered is not None:
            self._exchange(self._conversation, self._unanswered)
            return
        before, question = self._conversation.without_last_exchange()
        if question is None:
            self._screen.notice("there is no question to answer again")
        else:
            self._exchange(before, question)

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("give a file: !!save FILE")
        file = _with_suffix(_file_of(name))
        replaced = save_conversation(
            file, self._conversation, template_name=self._talker.template_name, roles=self._talker.roles
        )
        self._screen.notice(f"saved as {file}{', in place of an older one' if replaced else ''}")

    def _load(self, name: str) -> None:
        if not name:
            raise ConfigError("give a file: !!load FILE")
        file = _file_of(name)
        saved = load_conversation(file if os.path.exists(file) else _with_suffix(file))  # noqa: PTH110 - never raises
        self._conversation = saved.conversation
        self._unanswered = None
        if saved.template_name != self._talker.template_name:
            self._screen.notice(f"it was saved as {saved.template_name} and goes on as {self._talker.template_name}")
        labels = {"user": self._talker.roles[0], "assistant": self._talker.roles[1]}
        for turn in self._conversation.own_turns:
            self._screen.replay(labels[turn.speaker], turn.text)

    def _exchange(self, before: Conversation, text: str) -> None:
        """Ask `text` after `before`; only a whole answer changes the conversation."""
        known = before if self._config.has_history else replace(before, turns=before.turns[: before.offset])
        question = Question(
            turns=known.with_exchange(text, "").turns[:-1],
            system_message=known.system_message,
            options=self._config.options,
        )
        self._unanswered = None
        try:
            answered = self._answer(question)
        except KeyboardInterrupt:
            self._screen.notice("stopped; this exchange is dropped")
        except FastChatError as error:
            self._unanswered = text
            hint = "!!remove or !!reset makes room" if _is_too_long(error) else "!!regen asks again"
            self._screen.notice(f"error: {error.message} (The conversation is kept; {hint}.)")
        else:
            self._conversation = known.with_exchange(text, answered.text)
            self._tell_of(answered)
        self._answered_at = time.monotonic()

    def _answer(self, question: Question) -> Answered:
        if self._config.is_debug:
            self._screen.notice(f"debug: prompt: {self._run_on_loop(self._talker.prompt_of(question))!r}")
        self._screen.begin_answer(self._talker.roles[1])
        try:
            return self._run_on_loop(self._talker.answer(question, self._screen.write))
        finally:
            self._screen.end_answer()

    def _tell_of(self, answered: Answered) -> None:
        if answered.finish_reason == "length":
            self._screen.notice("(the answer was cut at its longest; --max-new-tokens sets that)")
        if self._config.is_debug:
            self._screen.notice(f"debug: {_figures(answered)}")


def _figures(answered: Answered) -> str:
    prompt = "?" if answered.num_prompt_tokens is None else answered.num_prompt_tokens
    if answered.num_generated_tokens is None:
        speed = "the server does not count tokens"
    else:
        per_second = answered.num_generated_tokens / max(answered.duration_s, 1e-9)
        speed = f"answer: {answered.num_generated_tokens} tokens, {per_second:.1f} tokens/s"
    return f"prompt: {prompt} tokens, first text after {answered.time_to_first_text_s:.2f} s, {speed}"


def _is_too_long(error: FastChatError) -> bool:
    return getattr(error, "code", None) == CONTEXT_CODE


def _file_of(name: str) -> Path:
    """What was typed behind a command as a file. Raises `ConfigError` for what no file can be called."""
    file = expand_home(name)
    if "\0" in name or not file.name:
        raise ConfigError(f"{name}: not the name of a file; give one.")
    return file


def _with_suffix(file: Path) -> Path:
    return file if file.name.endswith(".json") else file.with_name(f"{file.name}.json")
