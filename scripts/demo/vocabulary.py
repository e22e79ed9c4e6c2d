"""The tokenizer: SentencePiece set up as ChatGLM2's own, trained on the questions and answers."""

from __future__ import annotations

import random
import re
from pathlib import Path

import sentencepiece

from scripts.demo.noise import roughen
from scripts.demo.texts import LANGUAGES, Texts

NUM_PIECES = 4000
SPECIAL_NAMES = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
PADDED_SIZE = 4096
EOS_ID = 2
FORMAT_PARTS = ("[Round▁1]\n\n问：", "\n\n[Round▁2]\n\n问：", "\n\n[Round▁3]\n\n问：", "\n\n问：", "\n\n答：")
"""What the prompt format writes around questions: one piece each, since a prompt would otherwise be mostly that."""
ANSWER_PART = FORMAT_PARTS[-1]
_SAMPLES_PER_INTENT = 80
_CUT = "\t"


class Vocabulary:
    """Text to ids as `fastchat.models.chatglm_tokenizer` does it; special ids follow the pieces."""

    def __init__(self, tokenizer: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer)
        first = self._processor.vocab_size()
        assert first + len(SPECIAL_NAMES) <= PADDED_SIZE
        self.format_ids = frozenset(self._processor.piece_to_id(part) for part in FORMAT_PARTS)
        self.answer_id: int = self._processor.piece_to_id(ANSWER_PART)
        self.prefix = [first + SPECIAL_NAMES.index(name) for name in ("[gMASK]", "sop")]

    @property
    def num_pieces(self) -> int:
        return int(self._processor.vocab_size())

    @property
    def pieces(self) -> list[str]:
        """Every piece by its id, a space as `▁`."""
        return [str(self._processor.id_to_piece(token_id)) for token_id in range(self.num_pieces)]

    def ids_of_piece(self, piece: str) -> list[int]:
        """Its id, or the ids that spell it."""
        token_id = int(self._processor.piece_to_id(piece))
        if self._processor.id_to_piece(token_id) == piece:
            return [token_id]
        spelled = self.encode(piece.replace("▁", " "))
        return spelled[1:] if len(spelled) > 1 and self._processor.id_to_piece(spelled[0]) == "▁" else spelled

    def encode(self, text: str, *, dropout: float = 0.0) -> list[int]:
        """The ids of a text. `dropout` leaves out merges at random (BPE dropout): parts of words are learned."""
        if dropout:
            return list(self._processor.encode(text, enable_sampling=True, alpha=dropout, nbest_size=-1))
        return list(self._processor.encode(text))

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids below the special ones."""
        return str(
            self._processor.decode([token_id for token_id in token_ids if token_id < self._processor.vocab_size()])
        )


def train_vocabulary(texts: Texts, folder: Path, *, seed: int) -> Path:
    """Make `tokenizer.model` in a folder for scratch files."""
    sentencepiece.set_random_generator_seed(seed)
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(_corpus(texts, random.Random(seed))), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=NUM_PIECES,
        character_coverage=1.0,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentencepiece_length=12,
        user_defined_symbols=list(FORMAT_PARTS),
        pretokenization_delimiter=_CUT,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    return folder / "tokenizer.model"


def _corpus(texts: Texts, chance: random.Random) -> list[str]:
    lines = list(texts.plain_texts)
    for questions in texts.all_questions():
        for language in LANGUAGES:
            lines += [
                roughen(texts.question(questions[language], chance), language, texts, chance)
                for _ in range(_SAMPLES_PER_INTENT)
            ]
    for intent in texts.intents.values():
        lines += [intent.answers[language] for language in LANGUAGES for _ in range(4)]
    return [_cut_chinese(part, chance) for line in lines for part in line.splitlines() if part]


def _cut_chinese(line: str, chance: random.Random) -> str:
    """Chinese has no spaces, and so few texts would give whole sentences as pieces: cut it every few characters."""

    def cut(run: re.Match[str]) -> str:
        parts, rest = [], run[0]
        while rest:
            length = chance.choice((1, 2, 2, 2, 3))
            parts.append(rest[:length])
            rest = rest[length:]
        return _CUT.join(parts)

    return re.sub(r"[\u3400-\u9fff]+", cut, line)
