"""Text to ids and back, for ChatGLM's tokenizer and byte-level ones."""

from __future__ import annotations

import json
import re
import threading
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given
from hypothesis import strategies as st

from fastchat.errors import CheckpointError, InvalidRequestError
from fastchat.models.backend_tokenizer import BackendTokenizer, byte_values
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.length_bound import backend_bound
from fastchat.models.tokenizer import TemplateTokenizer, load_tokenizer
from fastchat.models.typed_names import any_of, cut_names
from tests.checkpoints import (
    PADDED_VOCAB_SIZE,
    SENTENCES,
    byte_level_definition,
    sentencepiece_model,
    write_checkpoint,
)

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
IDS = st.lists(st.integers(0, PADDED_VOCAB_SIZE - 1), max_size=30)


@cache
def tokenizer_of(family: Any) -> TemplateTokenizer:
    with TemporaryDirectory() as folder:
        return load_tokenizer(Checkpoint.open(write_checkpoint(Path(folder), family)))


@cache
def sentencepiece_processor() -> Any:
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
@given(text=TEXTS)
def test_decoding_gives_the_text_back(family: str, text: str) -> None:
    tokenizer = tokenizer_of(family)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("family", ["chatglm2", "chatglm3", "llama"])
@given(text=TEXTS | st.sampled_from(SENTENCES) | st.text("啊 \n<|user>im_end", max_size=200))
def test_no_text_has_fewer_ids_than_the_bound_says(family: str, text: str) -> None:
    """In a plain prompt, and in a rendered one where names of tokens are tokens."""
    tokenizer = tokenizer_of(family)
    assert tokenizer.max_id_characters is not None
    for token_ids in (tokenizer.encode_piece(text), tokenizer.encode_rendered(text)):
        assert len(token_ids) * tokenizer.max_id_characters >= len(text)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": "   "}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": None},
    ],
)
def test_a_tokenizer_that_may_lose_text_has_no_bound(change: dict[str, Any]) -> None:
    """Then a text is tokenized before it is refused."""
    definition = json.loads(byte_level_definition())
    assert backend_bound(definition, byte_values(), []) is not None
    assert backend_bound(definition | change, byte_values(), []) is None
    for lossy in ("lstrip", "rstrip"):
        eater = definition["added_tokens"][0] | {lossy: True}
        assert backend_bound(definition | {"added_tokens": [eater]}, byte_values(), []) is None
    model = definition["model"]
    smaller = model | {"vocab": {token: number for token, number in model["vocab"].items() if token != "a"}}
    assert backend_bound(definition | {"model": smaller}, byte_values(), []) is None


@given(text=TEXTS)
def test_byte_level_ids_are_the_librarys(text: str) -> None:
    theirs = tokenizers.Tokenizer.from_str(byte_level_definition())
    assert tokenizer_of("llama").encode_rendered(text) == theirs.encode(text, add_special_tokens=False).ids


@given(token_ids=IDS)
def test_byte_level_decoding_is_the_librarys(token_ids: list[int]) -> None:
    theirs = tokenizers.Tokenizer.from_str(byte_level_definition())
    for skip in (True, False):
        ours = tokenizer_of("llama").decode(token_ids, skip_special_tokens=skip)
        assert ours == theirs.decode(token_ids, skip_special_tokens=skip)


@given(token_ids=st.lists(st.integers(3, 479), max_size=30))
def test_sentencepiece_decoding_is_the_librarys(token_ids: list[int]) -> None:
    """Up to the number of U+FFFD: one for each incomplete character here, one for each byte of it there."""
    ours = tokenizer_of("chatglm2").decode(token_ids)
    theirs = sentencepiece_processor().decode(token_ids)
    assert re.sub("\ufffd+", "\ufffd", ours) == re.sub("\ufffd+", "\ufffd", theirs)


def test_special_ids_of_chatglm_are_computed_from_the_vocabulary() -> None:
    num_pieces = sentencepiece_processor().vocab_size()
    tokenizer = tokenizer_of("chatglm3")
    names = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    assert [tokenizer.special_token_id(name) for name in names] == list(range(num_pieces, num_pieces + len(names)))
    assert tokenizer.encode("") == tokenizer.prefix_ids() == [num_pieces + 1, num_pieces + 3]
    assert tokenizer_of("chatglm2").special_token_id("<|user|>") is None


@pytest.mark.parametrize("family", ["chatglm2", "llama"])
def test_padding_rows_stand_for_no_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    assert tokenizer.vocab_size == PADDED_VOCAB_SIZE
    assert tokenizer.decode([PADDED_VOCAB_SIZE - 1], skip_special_tokens=False) == ""
    assert tokenizer.token_bytes(PADDED_VOCAB_SIZE - 1) == b""


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
def test_markers_typed_as_text_never_become_special_ids(family: str) -> None:
    tokenizer = tokenizer_of(family)
    special = set(tokenizer.special_tokens.values())
    for name in tokenizer.special_tokens:
        text = f"a {name}b{name}"
        for token_ids in (tokenizer.encode_piece(text), tokenizer.encode_following(text)):
            assert special.isdisjoint(token_ids)
            assert tokenizer.decode(token_ids) == text


def test_a_unigram_model_s_special_tokens_stay_text_too() -> None:
    """They are among its pieces, where the library finds them whatever it is told of special tokens."""
    names = ["<unk>", "<s>", "</s>"]
    pieces = [*names, *(f"<0x{value:02X}>" for value in range(256)), "▁", *"abdefghi</s>", "▁hi"]
    model = tokenizers.models.Unigram([(piece, -index / 10) for index, piece in enumerate(pieces)], 0, True)
    definition = tokenizers.Tokenizer(model)
    definition.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    definition.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    definition.add_special_tokens(names)
    tokenizer = BackendTokenizer(
        definition.to_str(), vocab_size=len(pieces), eos_token_ids=frozenset({2}), bos_rule=None
    )
    for text in ("hi</s>", "</s>hi<s> </s></s>", "a<unk>b"):
        assert {0, 1, 2}.isdisjoint(tokenizer.encode_piece(text))
        assert {0, 1, 2}.isdisjoint(tokenizer.encode_following(text))
        assert tokenizer.decode(tokenizer.encode_piece(text)) == text
    assert tokenizer.encode_rendered("</s>") == [2]


@given(names=st.lists(st.text("<|ab>", max_size=6), max_size=8, unique=True), text=st.text("<|ab>", max_size=30))
def test_the_longest_name_at_a_place_is_found(names: list[str], text: str) -> None:
    """As by one pattern with all names, longer ones first."""
    plain = "|".join(re.escape(name) for name in sorted(filter(None, names), key=len, reverse=True)) or "(?!)"
    assert any_of(names).findall(text) == re.findall(plain, text)


@given(names=st.lists(st.text("<|ab>", min_size=2, max_size=6), max_size=8), text=st.text("<|ab>", max_size=30))
def test_no_name_is_left_whole(names: list[str], text: str) -> None:
    """Not even where names overlap."""
    pieces = cut_names(any_of(names), text)
    assert "".join(pieces) == text
    assert not any(any_of(names).search(piece) for piece in pieces)


def test_a_name_may_be_long() -> None:
    """A checkpoint may have any token."""
    assert any_of(["ab" * 5000]).fullmatch("ab" * 5000)


def test_text_full_of_beginnings_of_names_is_searched_quickly() -> None:
    """One call of a pattern holds every thread: four million characters must not take the time of as many names."""
    names = [f"<|reserved_special_token_{number}|>" for number in range(256)]
    text = "<|reserved_special_token_" * 40_000
    began_at = time.thread_time()
    assert any_of(names).search(text) is None
    few_s = time.thread_time() - began_at
    began_at = time.thread_time()
    assert any_of(names[:2]).search(text) is None
    assert few_s < 10 * (time.thread_time() - began_at) + 0.05


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
def test_a_long_text_is_tokenized_beside_other_threads(family: str) -> None:
    """The interpreter is free meanwhile: streams go on. The best of some tries, for a machine with other work."""
    tokenizer = tokenizer_of(family)
    text = "".join(SENTENCES) * 300
    shares = []
    for encode in (tokenizer.encode_piece, tokenizer.encode_rendered) * 4:
        thread = threading.Thread(target=encode, args=(text,))
        longest_s, began_at = 0.0, time.perf_counter()
        last = began_at
        thread.start()
        while thread.is_alive():
            time.sleep(0.001)
            longest_s, last = max(longest_s, time.perf_counter() - last), time.perf_counter()
        shares.append(longest_s / (last - began_at))
    assert min(shares[::2]) < 0.5
    assert min(shares[1::2]) < 0.5


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
def test_special_tokens_are_shown_when_asked_for(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for name, token_id in tokenizer.special_tokens.items():
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.decode([token_id], skip_special_tokens=False) == name


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
def test_token_bytes_join_to_the_text(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for sentence in SENTENCES:
        token_ids = tokenizer.encode_piece(sentence)
        joined = b"".join(tokenizer.token_bytes(token_id) for token_id in token_ids).decode()
        assert joined.removeprefix(" " if family == "chatglm3" else "") == sentence


@pytest.mark.parametrize("family", ["chatglm2", "llama"])
def test_a_lone_surrogate_is_the_clients_error(family: str) -> None:
    tokenizer = tokenizer_of(family)
    for encode in (tokenizer.encode, tokenizer.encode_piece, tokenizer.encode_rendered, tokenizer.encode_following):
        with pytest.raises(InvalidRequestError, match=r"lone surrogate \(U\+D83D\) at character 1"):
            encode("a\ud83d")


@pytest.mark.parametrize("family", ["chatglm2", "llama"])
@pytest.mark.parametrize("token_id", [-1, PADDED_VOCAB_SIZE])
def test_an_id_that_does_not_exist_is_the_clients_error(family: str, token_id: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"Token id {token_id} does not exist"):
        tokenizer_of(family).decode([token_id])


@pytest.mark.parametrize("family", ["chatglm3", "llama"])
def test_threads_do_not_disturb_each_other(family: str) -> None:
    tokenizer = tokenizer_of(family)
    texts = [f"{sentence} <|im_end|> <|user|> {number}" for number, sentence in enumerate(SENTENCES)]
    expected = [(tokenizer.encode(text), tokenizer.encode_rendered(text)) for text in texts]
    wrong: list[str] = []

    def work() -> None:
        for _ in range(20):
            for text, ids in zip(texts, expected, strict=True):
                if (tokenizer.encode(text), tokenizer.encode_rendered(text)) != ids:
                    wrong.append(text)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        (None, {"eos_token_id": 0}, {0, 2}),
        ({"eos_token_id": [1, 5]}, {"eos_token_id": 0}, {1, 2, 5}),
        ({"temperature": 1.0}, {"eos_token_id": [0, 9]}, {0, 2, 9}),
        (None, {"eos_token_id": None}, {2}),
        (None, {"eos_token_id": 99999}, {2}),
    ],
)
def test_ends_come_from_the_generation_config_else_the_config_and_from_the_tokenizer(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]
) -> None:
    write_checkpoint(tmp_path, "llama", generation_config=generation)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **config}))
    assert load_tokenizer(Checkpoint.open(tmp_path)).eos_token_ids == expected


@pytest.mark.parametrize(
    ("family", "file", "message"),
    [
        ("chatglm2", "tokenizer.model", r"tokenizer\.model: missing"),
        ("llama", "tokenizer.json", r"no tokenizer \(tokenizer\.json"),
        ("qwen2", "tokenizer.json", r"no tokenizer \(tokenizer\.json"),
    ],
)
def test_a_missing_tokenizer_is_named(tmp_path: Path, family: str, file: str, message: str) -> None:
    """transformers makes one without a vocabulary for some, to which every text is empty."""
    write_checkpoint(tmp_path, family)
    (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=message):
        load_tokenizer(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"IQ== 0\nIg== 1\n"])
def test_a_file_that_is_no_sentencepiece_model_is_named(tmp_path: Path, content: bytes) -> None:
    write_checkpoint(tmp_path, "chatglm2")
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.model: "):
        load_tokenizer(Checkpoint.open(tmp_path))


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"added_tokens": [], "model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    write_checkpoint(tmp_path, "llama")
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: cannot be read"):
        load_tokenizer(Checkpoint.open(tmp_path))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "chatglm2", config={"padded_vocab_size": 200})
    with pytest.raises(CheckpointError, match="do not fit"):
        load_tokenizer(Checkpoint.open(tmp_path))


@cache
def converted_llama() -> tuple[BackendTokenizer, Any]:
    """A Llama checkpoint that has only a SentencePiece model, converted by transformers."""
    with TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name), "llama", chat_template=None)
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(Checkpoint.open(folder))
        assert isinstance(ours, BackendTokenizer)
        return ours, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("text", [*SENTENCES, "", " two  spaces", "👋 </s> <s>", "\n\n"])
def test_a_sentencepiece_llama_tokenizes_as_in_transformers(text: str) -> None:
    ours, theirs = converted_llama()
    assert ours.prefix_ids() == [1]
    assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"]
    assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=True)
    assert ours.special_token_id("</s>") in ours.eos_token_ids


@given(token_ids=st.lists(st.integers(259, 479), max_size=20))
def test_a_sentencepiece_llama_decodes_as_in_transformers(token_ids: list[int]) -> None:
    ours, theirs = converted_llama()
    assert ours.decode(token_ids) == theirs.decode(token_ids)
