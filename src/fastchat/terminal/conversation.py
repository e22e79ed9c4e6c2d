"""A conversation as the terminal keeps it, and its file, which is FastChat's.

    {"template_name": "chatglm2", "system_message": "", "roles": ["问", "答"],
     "messages": [["问", "你好"], ["答", "你好！"]], "offset": 0}

`offset` counts the messages in front that are examples: they are sent, but neither shown nor removed. A loaded
conversation goes on in the format of the model that is talked to, whatever `template_name` says.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fastchat.errors import ConfigError

MAX_FILE_BYTES = 64 * 2**20
_KEYS = ("template_name", "system_message", "roles", "messages", "offset")

Speaker = Literal["user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side said."""

    speaker: Speaker
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Never changed: each exchange makes a new one, so that what fails leaves the old one in place."""

    system_message: str = ""
    turns: tuple[Turn, ...] = ()
    offset: int = 0

    @property
    def own_turns(self) -> tuple[Turn, ...]:
        """The turns that are shown and may be removed."""
        return self.turns[self.offset :]

    def with_exchange(self, question: str, answer: str) -> Conversation:
        """One more exchange at the end."""
        return replace(self, turns=(*self.turns, Turn("user", question), Turn("assistant", answer)))

    def without_last_exchange(self) -> tuple[Conversation, str | None]:
        """The conversation before its last exchange, and that exchange's question; None where there is none."""
        turns = self.turns
        if len(turns) > self.offset and turns[-1].speaker == "assistant":
            turns = turns[:-1]
        if len(turns) > self.offset and turns[-1].speaker == "user":
            return replace(self, turns=turns[:-1]), turns[-1].text
        return replace(self, turns=turns), None


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """What a file holds: the conversation, and the format it was held in."""

    template_name: str
    conversation: Conversation


def save_conversation(file: Path, conversation: Conversation, *, template_name: str, roles: tuple[str, str]) -> bool:
    """Write the file whole or not at all; True where it replaced an older saved conversation.

    Raises `ConfigError` where the file cannot be written, or holds something that is not a saved conversation.
    """
    replaces = os.path.exists(file)  # noqa: PTH110 - never raises, as a path's own does in a folder of others
    if replaces and not is_saved_conversation(file):
        raise ConfigError(f"{file}: exists and is not a saved conversation; give another name.")
    labels = {"user": roles[0], "assistant": roles[1]}
    content = {
        "template_name": template_name,
        "system_message": conversation.system_message,
        "roles": list(roles),
        "messages": [[labels[turn.speaker], turn.text] for turn in conversation.turns],
        "offset": conversation.offset,
    }
    try:
        _write_whole(file, json.dumps(content, ensure_ascii=False, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror or error}).") from error
    return replaces


def load_conversation(file: Path) -> SavedConversation:
    """Read a file of ours or of FastChat. Raises `ConfigError` that names the file and what is wrong in it."""
    content = _read_object(file)
    try:
        return _parsed(content)
    except ConfigError as error:
        raise ConfigError(f"{file}: not a saved conversation ({error.message}).") from None


def is_saved_conversation(file: Path) -> bool:
    """Whether the file is one that `load_conversation` reads."""
    try:
        load_conversation(file)
    except ConfigError:
        return False
    return True


def _write_whole(file: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=file.parent, prefix=f".{file.name}.", delete=False
    ) as stream:
        written = Path(stream.name)
        try:
            stream.write(text)
            stream.close()
            written.replace(file)
        except BaseException:
            written.unlink(missing_ok=True)
            raise


def _read_object(file: Path) -> dict[str, Any]:  # Any: JSON, here and below
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: larger than {MAX_FILE_BYTES // 2**20} MiB, so not a saved conversation.")
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror or error}).") from error
    except (ValueError, RecursionError):
        raise ConfigError(f"{file}: not a saved conversation (it is not JSON).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: not a saved conversation (it is not a JSON object).")
    return content


def _parsed(content: dict[str, Any]) -> SavedConversation:
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ConfigError(f"{missing[0]} is missing")
    for key in ("template_name", "system_message"):
        if not isinstance(content[key], str):
            raise ConfigError(f"{key} must be a string")
    roles, messages, offset = content["roles"], content["messages"], content["offset"]
    if not isinstance(roles, list) or len(roles) != 2 or not all(isinstance(role, str) for role in roles):
        raise ConfigError("roles must be two strings")
    if not isinstance(messages, list):
        raise ConfigError("messages must be a list")
    if not isinstance(offset, int) or isinstance(offset, bool) or not 0 <= offset <= len(messages):
        raise ConfigError("offset must be a number from 0 to the number of messages")
    if messages and messages[-1] == [roles[1], None]:
        messages = messages[:-1]  # FastChat's place for an answer that has not come
    turns = tuple(_turn(message, number, roles) for number, message in enumerate(messages))
    conversation = Conversation(content["system_message"], turns, min(offset, len(turns)))
    return SavedConversation(content["template_name"], conversation)


def _turn(message: Any, number: int, roles: list[str]) -> Turn:
    is_pair = isinstance(message, list) and len(message) == 2 and all(isinstance(part, str) for part in message)
    if not is_pair or message[0] not in roles:
        raise ConfigError(f"messages[{number}] must be a role of {roles[0]} and {roles[1]}, and a text")
    return Turn("user" if message[0] == roles[0] else "assistant", message[1])
