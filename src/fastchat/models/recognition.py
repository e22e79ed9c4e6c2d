"""Which chat format a checkpoint wants, from its own files and at last from its folder's name. Torch-free.

The signs, strongest first; their values are in the files of `formats/`:

1. the text of the checkpoint's `tokenization_*.py` (read, never run), where one format alone fits;
2. the name it was published under: `_name_or_path` of the raw config.json, `name_or_path` of tokenizer_config.json;
3. special tokens for roles in its vocabulary;
4. the folder's name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastchat.models.checkpoint import Checkpoint
from fastchat.models.format_spec import FormatSpec, builtin_formats

FOLDER_SOURCE = "the folder's name"


@dataclass(frozen=True, slots=True)
class Recognised:
    """A format's name and the sign that it was recognised by, as a phrase for the log."""

    format_name: str
    source: str


def recognise(checkpoint: Checkpoint, has_token: Callable[[str], bool] | None = None) -> Recognised | None:
    """The format of a checkpoint, or None. Without `has_token`, signs in the vocabulary are not looked for."""
    candidates = [
        spec
        for spec in builtin_formats().values()
        if not spec.recognise.families or checkpoint.family.name in spec.recognise.families
    ]
    if has_token is not None:
        candidates = [spec for spec in candidates if all(has_token(name) for name in spec.token_names)]
    return (
        _by_tokenizer_text(checkpoint, candidates)
        or _by_published_name(checkpoint, candidates)
        or (_by_tokens(candidates, has_token) if has_token is not None else None)
        or _by_name(checkpoint.name, candidates, FOLDER_SOURCE)
    )


def _by_tokenizer_text(checkpoint: Checkpoint, candidates: Sequence[FormatSpec]) -> Recognised | None:
    for file in sorted(checkpoint.path.glob("tokenization_*.py")):
        text = file.read_text(encoding="utf-8", errors="replace")
        fitting = [
            spec.name
            for spec in candidates
            if spec.recognise.tokenizer_text and all(sign in text for sign in spec.recognise.tokenizer_text)
        ]
        if len(fitting) == 1:
            return Recognised(fitting[0], file.name)
    return None


def _by_published_name(checkpoint: Checkpoint, candidates: Sequence[FormatSpec]) -> Recognised | None:
    for name, source in _published_names(checkpoint):
        recognised = _by_name(name, candidates, source)
        if recognised is not None:
            return recognised
    return None


def _published_names(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    places = (
        (checkpoint.config.get("_name_or_path"), "_name_or_path in config.json"),
        (checkpoint.tokenizer_config.get("name_or_path"), "name_or_path in tokenizer_config.json"),
    )
    for name, source in places:
        if isinstance(name, str) and name:
            yield re.split(r"[/\\]", name.rstrip("/\\"))[-1], source


def _by_tokens(candidates: Sequence[FormatSpec], has_token: Callable[[str], bool]) -> Recognised | None:
    for spec in candidates:
        if spec.recognise.tokens and all(has_token(name) for name in spec.recognise.tokens):
            return Recognised(spec.name, f"the token {spec.recognise.tokens[0]} in its vocabulary")
    return None


def _by_name(name: str, candidates: Sequence[FormatSpec], source: str) -> Recognised | None:
    """The format whose pattern covers most of the name: `chatglm3` is said more exactly than `chatglm`."""
    plain = name.lower().replace("_", "-")
    best: tuple[int, str] | None = None
    for spec in candidates:
        for pattern in spec.recognise.names:
            match = re.search(pattern, plain)
            if match is not None and (best is None or len(match[0]) > best[0]):
                best = (len(match[0]), spec.name)
    return Recognised(best[1], f"{source} ({name})") if best is not None else None
