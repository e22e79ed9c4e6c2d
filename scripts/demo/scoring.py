"""Greedy answers of the model in training, scored against the held-out questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import GlmForCausalLM

from scripts.demo.dialogues import prompt_of
from scripts.demo.heldout import Question
from scripts.demo.vocabulary import EOS_ID, Vocabulary

MAX_ANSWER_TOKENS = 256
_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Scored:
    """One question with the answer it got; `ended` means that the model stopped by itself."""

    question: Question
    answer: str
    ended: bool

    @property
    def is_right(self) -> bool:
        """Whether the answer ended and holds what it must."""
        return self.ended and self.question.is_answered_by(self.answer)


def score(model: GlmForCausalLM, vocabulary: Vocabulary, questions: Sequence[Question]) -> list[Scored]:
    """Answer all questions turn by turn, many at a time."""
    histories: list[list[tuple[str, str]]] = [[] for _ in questions]
    ended = [True] * len(questions)
    for turn in range(max(len(question.turns) for question in questions)):
        open_ones = [number for number, question in enumerate(questions) if turn < len(question.turns)]
        for start in range(0, len(open_ones), _BATCH_SIZE):
            batch = open_ones[start : start + _BATCH_SIZE]
            prompts = [prompt_of(histories[number], questions[number].turns[turn]) for number in batch]
            for number, (answer, has_ended) in zip(batch, _generate(model, vocabulary, prompts), strict=True):
                histories[number].append((questions[number].turns[turn], answer))
                ended[number] = has_ended
    return [
        Scored(question, history[-1][1], has_ended)
        for question, history, has_ended in zip(questions, histories, ended, strict=True)
    ]


@torch.inference_mode()
def _generate(model: GlmForCausalLM, vocabulary: Vocabulary, prompts: Sequence[str]) -> list[tuple[str, bool]]:
    rows = [vocabulary.prefix + vocabulary.encode(prompt) for prompt in prompts]
    width = max(map(len, rows))
    model.eval()
    output = model.generate(
        input_ids=torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        max_new_tokens=MAX_ANSWER_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    model.train()
    answers = []
    for row in output[:, width:].tolist():
        has_ended = EOS_ID in row
        answers.append((vocabulary.decode(row[: row.index(EOS_ID)] if has_ended else row).strip(), has_ended))
    return answers
