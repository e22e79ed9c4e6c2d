"""One bad input: what is sent, as a person would say it and as bytes, and the answer that it must get."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODEL = "chatglm2-tiny"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"
TOKENIZE = "/tokenize"

Check = Callable[[Any], None]
"""Looks at the `Answer`, and asserts."""


@dataclass(frozen=True)
class Case:
    """`status` and `code` are the answer's; `raw` is the whole request where HTTP itself is what is wrong."""

    what: str
    status: int
    code: str | None = None
    body: object = None
    path: str = CHAT
    method: str = "POST"
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: Callable[[str], Sequence[bytes] | Iterator[bytes]] | None = None
    check: Check | None = None
    needs_key: bool = False

    def pieces(self, host: str) -> Sequence[bytes] | Iterator[bytes]:
        """The request's bytes."""
        if self.raw is not None:
            return self.raw(host)
        body = self.body() if callable(self.body) else self.body
        if self.method == "GET":
            body = b""
        elif not isinstance(body, bytes):
            body = json.dumps(body, ensure_ascii=False).encode()
        lines = {"Host": host, "Connection": "close", "Content-Length": str(len(body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        return [f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body]

    @property
    def answer(self) -> str:
        """The answer as the document shows it."""
        return f"{self.status} `{self.code}`" if self.code else str(self.status)


@dataclass(frozen=True)
class Row:
    """What the cases of one number have in common, and the rule that decides."""

    number: str
    title: str
    rule: str
    cases: tuple[Case, ...]


def chat(**fields: object) -> dict:
    """A good conversation with some fields of its own."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, **fields}


def completion(**fields: object) -> dict:
    """A good completion with some fields of its own."""
    return {"model": MODEL, "prompt": "Hello", "max_tokens": 4, **fields}


def embedding(**fields: object) -> dict:
    """A good request for vectors with some fields of its own."""
    return {"model": MODEL, "input": "Hello", **fields}


def said(content: object, **fields: object) -> dict:
    """A conversation of one message of a user."""
    return chat(messages=[{"role": "user", "content": content}], **fields)


def shown(value: object) -> str:
    """A value as the document shows it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=True)
    return f"`{text if len(text) <= 48 else text[:45] + '...'}`".replace("|", "\\|")


def refused(
    field_name: str, *values: object, code: str = "invalid_value", make: Callable[..., dict] = chat, **others: object
) -> tuple[Case, ...]:
    """One case for each value of a field that must be refused by that name."""
    path = {chat: CHAT, completion: COMPLETIONS, embedding: EMBEDDINGS}[make]
    return tuple(
        Case(
            f"`{field_name}` {shown(value)}",
            400,
            code,
            body=lambda value=value: make(**{**others, field_name: value}),
            path=path,
            check=names(field_name),
        )
        for value in values
    )


def names(param: str) -> Check:
    """The error's `param` is that field, or a place in it."""

    def check(answer: Any) -> None:
        assert (answer.error["param"] or "").startswith(param), answer.error

    return check
