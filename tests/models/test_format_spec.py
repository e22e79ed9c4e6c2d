"""Format files are checked: a mistake names the file, the key and what is expected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastchat.errors import ConfigError
from fastchat.models.format_spec import FORMATS_FOLDER, TextPiece, TokenPiece, parse_format, read_format

MINIMAL: dict[str, Any] = {"name": "mine", "user": ["{content}"], "assistant": ["{content}"], "generation": []}


def test_pieces_are_text_tokens_and_text_alone() -> None:
    spec = parse_format({**MINIMAL, "user": ["a{content}b{round}", {"token": "<|user|>"}, {"piece": "{metadata}\n"}]})
    assert spec.user == (
        TextPiece(("a", "content", "b", "round", "")),
        TokenPiece("<|user|>"),
        TextPiece(("", "metadata", "\n"), is_alone=True),
    )
    assert spec.token_names == {"<|user|>"}


def test_values_are_not_searched_for_fields() -> None:
    piece = parse_format({**MINIMAL, "user": ["[{round}] {content} {other}"]}).user[0]
    assert isinstance(piece, TextPiece)
    assert piece.fill({"round": "1", "content": "{round}{content}"}) == "[1] {round}{content} {other}"


@pytest.mark.parametrize("file", sorted(FORMATS_FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_file_has_the_name_that_is_in_it(file: Path) -> None:
    spec = read_format(file)
    assert spec.name == file.stem
    assert spec.description


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users": []}, "unknown key 'users'"),
        ({"name": 3}, "'name' must be a string"),
        ({"name": ""}, "'name' must not be empty"),
        ({"user": "text"}, "'user' must be a list of pieces"),
        ({"user": [{"token": ""}]}, "'user' has"),
        ({"user": [{"text": "a"}]}, "'user' has"),
        ({"roles": ["a"]}, "two labels"),
        ({"first_round": -1}, "whole number"),
        ({"has_prefix": "yes"}, "true or false"),
        ({"stop_strings": [""]}, "not empty"),
        ({"system_in_user": "{system}"}, r"must hold \{system\} and \{content\}"),
        ({"system": ["{content}"], "system_in_user": "{system}{content}"}, "one way only"),
        ({"recognise": {"name": []}}, "'recognise' must be an object"),
        ({"recognise": {"names": ["("]}}, "not a pattern"),
    ],
)
def test_a_mistake_names_file_and_key(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({**MINIMAL, **change}))
    with pytest.raises(ConfigError, match=f"mine.json: .*{message}"):
        read_format(file)


@pytest.mark.parametrize("content", ["", "[]", '{"name": "mine"}'])
def test_a_file_that_is_no_format_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"mine\.json: "):
        read_format(file)
    with pytest.raises(ConfigError, match=r"other\.json: not a readable"):
        read_format(tmp_path / "other.json")
