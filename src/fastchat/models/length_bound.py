"""How much text one token id can stand for at most, where a tokenizer's definition proves it. Torch-free.

Such a bound shows without tokenizing that a text is longer than a context. It exists where every character of a text is
in some id, and no id has more characters than its piece: nothing is normalised away, dropped between words, eaten by a
token beside it, or joined with its neighbours to one unknown.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_BYTE_PIECES = frozenset(f"<0x{value:02X}>" for value in range(256))
_KEEPING_SPLITTERS = frozenset({"ByteLevel", "Metaspace", "Digits"})


def sentencepiece_bound(model: bytes, special_names: Iterable[str]) -> int | None:
    """Characters per id of a SentencePiece model, given as its file's bytes."""
    from sentencepiece import sentencepiece_model_pb2  # its classes exist only once it is imported

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    rules = proto.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces or not proto.trainer_spec.byte_fallback:
        return None
    return _longest([*(piece.piece for piece in proto.pieces), *special_names])


def backend_bound(
    parsed: Mapping[str, Any],  # Any: a JSON file
    alphabet: Iterable[str],
    tokens: Iterable[str],
) -> int | None:
    """Characters per id of a parsed tokenizer.json: a BPE that has a token for every byte.

    `alphabet` is the spelling of the 256 bytes in byte-level models. A byte-level token's characters are bytes, of
    which a character has at least one.
    """
    model = parsed["model"]
    normalizers = list(_steps(parsed.get("normalizer"), "normalizers"))
    splitters = list(_steps(parsed.get("pre_tokenizer"), "pretokenizers"))
    is_byte_level = any(step["type"] == "ByteLevel" for step in splitters)
    bytes_needed = set(alphabet) if is_byte_level else _BYTE_PIECES
    keeps_all = (
        model.get("type") == "BPE"
        and (is_byte_level or model.get("byte_fallback") is True)
        and bytes_needed <= set(model["vocab"])
        and all(_keeps_length(step) for step in normalizers)
        and all(_keeps_text(step) for step in splitters)
        and not any(_takes_more(entry, is_normalized=bool(normalizers)) for entry in parsed["added_tokens"])
    )
    return _longest([*model["vocab"], *tokens]) if keeps_all else None


def _steps(step: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:  # Any: as above
    if step is None:
        return
    if step["type"] == "Sequence":
        for part in step[inner]:
            yield from _steps(part, inner)
    else:
        yield step


def _keeps_length(step: Mapping[str, Any]) -> bool:  # Any: a JSON file
    """Whether a normalizer leaves a text at least as long: Llama 2's two do."""
    if step["type"] == "Replace":
        pattern = step["pattern"].get("String")
        return pattern is not None and len(step["content"]) >= len(pattern)
    return bool(step["type"] == "Prepend")


def _keeps_text(step: Mapping[str, Any]) -> bool:  # Any: a JSON file
    return step["type"] in _KEEPING_SPLITTERS or (step["type"] == "Split" and step["behavior"] != "Removed")


def _takes_more(entry: Mapping[str, Any], *, is_normalized: bool) -> bool:  # Any: a JSON file
    """Whether an added token stands for more of a text than its own name."""
    return bool(entry.get("lstrip") or entry.get("rstrip") or (is_normalized and entry.get("normalized")))


def _longest(pieces: Iterable[str]) -> int:
    return max(map(len, pieces))
