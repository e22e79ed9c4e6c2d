"""Text that comes in pieces is the text that comes at once."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastchat.models.backend_tokenizer import BackendTokenizer
from fastchat.models.detokenizer import Detokenizer
from tests.checkpoints import PADDED_VOCAB_SIZE
from tests.models.test_tokenizer import converted_llama, tokenizer_of

FAMILIES = pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "llama", "converted"])
# Half of the ids are single bytes, so that characters are cut and invalid bytes appear.
TOKEN_IDS = st.lists(st.one_of(st.integers(0, PADDED_VOCAB_SIZE - 1), st.integers(3, 258)), max_size=40)


def load(family: str):
    return converted_llama()[0] if family == "converted" else tokenizer_of(family)


@FAMILIES
@given(token_ids=TOKEN_IDS, sizes=st.lists(st.integers(1, 5), min_size=40, max_size=40), skip=st.booleans())
def test_pushed_pieces_join_to_the_whole_text(family: str, token_ids: list[int], sizes: list[int], skip: bool) -> None:
    tokenizer = load(family)
    detokenizer = Detokenizer(tokenizer, (), skip)
    pieces: list[str] = []
    start = 0
    for size in sizes:
        pieces.append(detokenizer.push(token_ids[start : start + size]))
        start += size
    pieces.append(detokenizer.finish())
    assert "".join(pieces) == tokenizer.decode(token_ids, skip_special_tokens=skip)


@FAMILIES
@given(prompt=TOKEN_IDS, token_ids=TOKEN_IDS)
def test_prompt_and_text_are_the_decoding_of_both(family: str, prompt: list[int], token_ids: list[int]) -> None:
    """For a prompt that ends within a character, the prompt's share is its text without that start."""
    tokenizer = load(family)
    detokenizer = Detokenizer(tokenizer, prompt)
    text = detokenizer.push(token_ids) + detokenizer.finish()
    opening = Detokenizer(tokenizer)
    assert opening.push(prompt) + text == tokenizer.decode(prompt + token_ids)


@FAMILIES
def test_half_a_character_is_never_pushed(family: str) -> None:
    tokenizer = load(family)
    token_ids = tokenizer.encode("👋🌍 é 你")
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "👋🌍 é 你"
    assert detokenizer.finish() == ""


def test_an_incomplete_last_character_is_one_replacement_at_the_end() -> None:
    tokenizer = tokenizer_of("chatglm2")
    start_of_emoji = [3 + byte for byte in "👋".encode()[:3]]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("x"))
    assert detokenizer.push(start_of_emoji) == ""
    assert detokenizer.finish() == "\ufffd"


def test_a_word_after_a_prompt_keeps_its_space_and_the_first_of_a_text_does_not() -> None:
    tokenizer = tokenizer_of("chatglm2")
    word = tokenizer.encode_piece("user")
    assert Detokenizer(tokenizer, tokenizer.encode("hi")).push(word) == " user"
    assert Detokenizer(tokenizer, tokenizer.prefix_ids()).push(word) == "user"


def test_of_several_leading_spaces_one_is_dropped() -> None:
    """Llama 2 has pieces of two spaces and more, for code."""
    definition = json.loads(converted_llama()[1].backend_tokenizer.to_str())
    vocabulary = definition["model"]["vocab"]
    spaces = len(vocabulary)
    definition["model"] |= {"vocab": {**vocabulary, "▁▁": spaces}, "merges": [["▁", "▁"]]}
    tokenizer = BackendTokenizer(
        json.dumps(definition), vocab_size=PADDED_VOCAB_SIZE, eos_token_ids=frozenset(), bos_rule=None
    )
    token_ids = [spaces, *tokenizer.encode_following("x")]
    assert Detokenizer(tokenizer).push(token_ids) == tokenizer.decode(token_ids) == " x"


@FAMILIES
def test_the_cost_of_a_token_does_not_grow_with_the_answer(family: str) -> None:
    """Invalid bytes without end are the worst case: nothing before them may be decoded again."""
    tokenizer = load(family)
    detokenizer = Detokenizer(tokenizer)

    def seconds_for(num_tokens: int) -> float:
        started = time.thread_time()
        for _ in range(num_tokens):
            detokenizer.push([3 + 0x80])
        return time.thread_time() - started

    early = min(seconds_for(500) for _ in range(5))
    seconds_for(50_000)
    late = min(seconds_for(500) for _ in range(5))
    assert late < 20 * early
