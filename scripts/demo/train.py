"""Train the demo model:  python -m scripts.demo.train  (from the repository's root)

Makes the tokenizer from the texts, trains on an endless stream of dialogues made from them, prints the score on the
held-out questions and writes ChatGLM2's original layout to src/fastchat/models/demo/chatglm2-demo. One thread and fixed
seeds: the same machine and library versions give the same weights, others the same quality.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import GlmForCausalLM

from fastchat.models.checkpoint import Checkpoint
from fastchat.models.weights import load_model
from scripts.demo.checkpoint import make_model, write_checkpoint
from scripts.demo.dialogues import Dialogues, Sample
from scripts.demo.heldout import HELD_OUT_LISTS, load_guide, load_held_out
from scripts.demo.scoring import Scored, score
from scripts.demo.texts import Texts
from scripts.demo.vocabulary import EOS_ID, PADDED_SIZE, Vocabulary, train_vocabulary

TARGET = Path("src/fastchat/models/demo/chatglm2-demo")
SEED = 20230801
NUM_STEPS = 3000
BATCH_TOKENS = 1536
PEAK_RATE, RESUMED_PEAK_RATE = 2e-3, 1.5e-3
HIDDEN_DROPOUT = 0.1
WARMUP_STEPS = 150
POOL_SIZE = 512
DROPOUT_SHARE, DROPOUT = 0.25, 0.1
CUT_SHARE, CUT_TOKENS = 0.88, (3, 9)
"""Most answers are cut short: which answer it is shows in its first words, and the rest is soon known by heart."""
IGNORED = -100

Row = tuple[list[int], list[int]]
"""Token ids, and the same once more with `IGNORED` for those that do not count in the loss."""


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps (default: {NUM_STEPS})")
    parser.add_argument("--output", type=Path, default=TARGET, help=f"folder to write (default: {TARGET})")
    parser.add_argument("--resume", action="store_true", help="go on from the model in the folder, with new dialogues")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the dialogues (default: {SEED})")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began = time.monotonic()
    texts = Texts.load()
    held_out = [question.turns[-1] for question in load_held_out()]
    leaked = texts.trained_word_for_word(held_out)
    assert not leaked, f"these held-out questions are trained on word for word, change them: {leaked}"
    tokenizer = _make_tokenizer(texts)
    vocabulary = Vocabulary(tokenizer)
    model = _read(arguments.output, vocabulary) if arguments.resume else make_model()
    print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(texts.intents)} intents", flush=True
    )

    peak_rate = RESUMED_PEAK_RATE if arguments.resume else PEAK_RATE
    _drop_at_random(model)
    batches = _batches(Dialogues(texts, held_out, seed=arguments.seed), vocabulary, random.Random(arguments.seed))
    _train(model, batches, num_steps=arguments.steps, peak_rate=peak_rate)
    write_checkpoint(model, tokenizer, arguments.output)
    _report("guide", score(model, vocabulary, load_guide()))
    for name in HELD_OUT_LISTS:
        _report(name, score(model, vocabulary, load_held_out(lists=[name])))
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size:,} bytes, {time.monotonic() - began:.0f} s in all")


def _make_tokenizer(texts: Texts) -> bytes:
    with tempfile.TemporaryDirectory() as work:
        return train_vocabulary(texts, Path(work), seed=SEED).read_bytes()


def _read(folder: Path, vocabulary: Vocabulary) -> GlmForCausalLM:
    """The model of an earlier run, taught the new vocabulary: a piece that was not there is what spelled it before."""
    model = load_model(Checkpoint.open(folder), dtype="float32")
    assert isinstance(model, GlmForCausalLM)
    before = Vocabulary((folder / "tokenizer.model").read_bytes())
    spellings = [before.ids_of_piece(piece) for piece in vocabulary.pieces]
    spellings += [[before.num_pieces + number] for number in range(PADDED_SIZE - len(spellings))]
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        rows = [weight.data[[min(one, PADDED_SIZE - 1) for one in ids]].mean(dim=0) for ids in spellings]
        weight.data = torch.stack(rows)
    return model.requires_grad_(requires_grad=True).train()


def _drop_at_random(model: GlmForCausalLM) -> None:
    """Dropout while training, which transformers' GLM has only in its attention weights."""

    def drop(module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, HIDDEN_DROPOUT, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def _train(model: GlmForCausalLM, batches: Iterator[list[Row]], *, num_steps: int, peak_rate: float) -> None:
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight for weight in model.parameters() if weight.dim() > 1], "weight_decay": 0.05},
            {"params": [weight for weight in model.parameters() if weight.dim() == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
        fused=True,
    )
    began, num_tokens, mean_loss = time.monotonic(), 0, 0.0
    for step in range(1, num_steps + 1):
        rows = next(batches)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * _rate(step, num_steps)
        loss = _loss(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        num_tokens += sum(len(ids) for ids, _ in rows)
        mean_loss += (loss.item() - mean_loss) / min(step, 50)
        if step % 100 == 0:
            elapsed = time.monotonic() - began
            print(f"step {step} loss {mean_loss:.4f} {num_tokens / elapsed:.0f} tokens/s {elapsed:.0f} s", flush=True)


def _rate(step: int, num_steps: int) -> float:
    """Warm-up, then a cosine down to 2 %."""
    if step < WARMUP_STEPS:
        return step / WARMUP_STEPS
    return 0.02 + 0.98 * (1 + math.cos(math.pi * step / num_steps)) / 2


def _loss(model: GlmForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """Mean loss over the tokens that count. Padding is on the right, where causal attention does not look."""
    width = max(len(ids) for ids, _ in rows)
    inputs = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    targets = torch.tensor([targets[1:] + [IGNORED] * (width - len(targets) + 1) for _, targets in rows])
    hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state  # (rows, width, hidden_size)
    counts = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[counts]), targets[counts])


def _batches(dialogues: Dialogues, vocabulary: Vocabulary, chance: random.Random) -> Iterator[list[Row]]:
    """Batches of rows of nearly equal length, in random order."""
    while True:
        pool = sorted(
            (_row(dialogues.sample(), vocabulary, chance) for _ in range(POOL_SIZE)), key=lambda row: len(row[0])
        )
        batches: list[list[Row]] = [[]]
        for row in pool:
            if (len(batches[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                batches.append([])
            batches[-1].append(row)
        chance.shuffle(batches)
        yield from batches


def _row(sample: Sample, vocabulary: Vocabulary, chance: random.Random) -> Row:
    if not sample.is_chat:
        ids = vocabulary.encode(sample.answer)
        return [*vocabulary.prefix, *ids, EOS_ID], [IGNORED] * (len(vocabulary.prefix) + 1) + [*ids[1:], EOS_ID]
    dropout = DROPOUT if chance.random() < DROPOUT_SHARE else 0.0
    prompt = vocabulary.encode(sample.prompt, dropout=dropout)
    answer = [*vocabulary.encode(sample.answer), EOS_ID]
    if chance.random() < CUT_SHARE:
        answer = answer[: chance.randint(*CUT_TOKENS)]
    earlier = [IGNORED] * len(prompt) if dropout else _earlier_answers(prompt, vocabulary)
    return vocabulary.prefix + prompt + answer, [IGNORED] * len(vocabulary.prefix) + earlier + answer


def _earlier_answers(prompt: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    """The answers inside a prompt count too: this is where most are read in full.

    Not their first token, which is written without the space that a new answer begins with.
    """
    targets, is_answer, follows_format = [], False, False
    for token_id in prompt:
        is_format = token_id in vocabulary.format_ids
        if is_format:
            is_answer = token_id == vocabulary.answer_id
        targets.append(token_id if is_answer and not is_format and not follows_format else IGNORED)
        follows_format = is_format
    return targets


def _report(name: str, scores: Sequence[Scored]) -> None:
    for one in scores:
        if not one.is_right:
            print(f"wrong: {one.question.turns} -> {one.answer!r}")
    groups = {
        "en": [one for one in scores if one.question.language == "en" and len(one.question.turns) == 1],
        "zh": [one for one in scores if one.question.language == "zh" and len(one.question.turns) == 1],
        "two turns": [one for one in scores if len(one.question.turns) == 2],
    }
    for group, members in groups.items():
        num_right = sum(one.is_right for one in members)
        print(f"{name}, {group}: {num_right} of {len(members)} right ({num_right / len(members):.1%})", flush=True)


if __name__ == "__main__":
    main()
