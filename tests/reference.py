"""The cases that the original ChatGLM code was run on, where they are at hand (see each test for what they prove)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "reference"
NAMES = ("chatglm2-tiny", "chatglm3-tiny")

needs_reference = pytest.mark.skipif(not FOLDER.exists(), reason="the reference checkpoints are not beside the project")


@dataclass(frozen=True)
class Case:
    """One prompt with the original code's ids. `messages` is the conversation as our API takes it, for chat cases."""

    name: str
    input_ids: tuple[int, ...]
    greedy_ids: tuple[int, ...]
    text: str | None = None
    messages: tuple[dict, ...] | None = None


def cases(checkpoint: str) -> list[Case]:
    """All fifteen cases of one checkpoint."""
    expected = json.loads((FOLDER / checkpoint / "expected.json").read_text())
    plain = [
        Case(f"plain-{i}", tuple(case["input_ids"]), tuple(case["greedy_ids"]), text=case["text"])
        for i, case in enumerate(expected["plain"])
    ]
    chat = [
        Case(f"chat-{i}", tuple(case["input_ids"]), tuple(case["greedy_ids"]), messages=tuple(conversation(case)))
        for i, case in enumerate(expected["chat"])
    ]
    assert len(plain) + len(chat) == 15
    return plain + chat


def conversation(case: dict) -> list[dict]:
    """A case's history (pairs for ChatGLM2, messages for ChatGLM3) and query as messages."""
    messages = []
    for turn in case["history"]:
        if isinstance(turn, dict):
            messages.append(turn)
        else:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": case.get("role", "user"), "content": case["query"]}]
