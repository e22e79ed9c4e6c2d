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
from scripts.demo.heldout import load_guide, load_held_out
from scripts.demo.scoring import Scored, score
from scripts.demo.texts import Texts
from scripts.demo.vocabulary import EOS_ID, Vocabulary, train_vocabulary

TARGET = Path("src/fastchat/models/demo/chatglm2-demo")
SEED = 20230801
NUM_STEPS = 3000
BATCH_TOKENS = 1536
PEAK_RATE, RESUMED_PEAK_RATE = 2e-3, 1.5e-3
HIDDEN_DROPOUT = 0.1
WARMUP_STEPS = 150
POOL_SIZE = 512
DROPOUT_SHARE, DROPOUT = 0.25, 0.1
CUT_SHARE, CUT_TOKENS = 0.8, (4, 14)
"""Most answers are cut short: which answer it is shows in its first words, and the rest is soon known by heart."""
IGNORED = -100

Row = tuple[list[int], int]
"""Token ids, and how many of them at the start do not count in the loss."""


def main() -> None:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help=f"optimizer steps (default: {NUM_STEPS})")
    parser.add_argument("--output", type=Path, default=TARGET, help=f"folder to write (default: {TARGET})")
    parser.add_argument("--resume", action="store_true", help="go on from the model in the folder, with new dialogues")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    began = time.monotonic()
    texts = Texts.load()
    held_out = [question.turns[-1] for question in load_held_out()]
    leaked = texts.trained_word_for_word(held_out)
    assert not leaked, f"these held-out questions are trained on word for word, change them: {leaked}"
    seed = SEED + arguments.resume
    tokenizer, model = _read(arguments.output) if arguments.resume else _begin(texts)
    vocabulary = Vocabulary(tokenizer)
    print(
        f"{sum(weight.numel() for weight in model.parameters()):,} parameters, {len(texts.intents)} intents", flush=True
    )

    peak_rate = RESUMED_PEAK_RATE if arguments.resume else PEAK_RATE
    _drop_at_random(model)
    batches = _batches(Dialogues(texts, held_out, seed=seed), vocabulary, random.Random(seed))
    _train(model, batches, num_steps=arguments.steps, peak_rate=peak_rate)
    write_checkpoint(model, tokenizer, arguments.output)
    _report(score(model, vocabulary, [*load_guide(), *load_held_out()]))
    size = sum(file.stat().st_size for file in arguments.output.iterdir())
    print(f"{arguments.output}: {size:,} bytes, {time.monotonic() - began:.0f} s in all")


def _begin(texts: Texts) -> tuple[bytes, GlmForCausalLM]:
    """A new tokenizer and a new model."""
    with tempfile.TemporaryDirectory() as work:
        return train_vocabulary(texts, Path(work), seed=SEED).read_bytes(), make_model()


def _read(folder: Path) -> tuple[bytes, GlmForCausalLM]:
    """Tokenizer and model of an earlier run."""
    model = load_model(Checkpoint.open(folder), dtype="float32")
    assert isinstance(model, GlmForCausalLM)
    return (folder / "tokenizer.model").read_bytes(), model.requires_grad_(requires_grad=True).train()


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
    targets = torch.tensor(
        [[IGNORED] * (start - 1) + ids[start:] + [IGNORED] * (width - len(ids) + 1) for ids, start in rows]
    )
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
        ids = vocabulary.prefix + vocabulary.encode(sample.answer) + [EOS_ID]
        return ids, len(vocabulary.prefix) + 1
    dropout = DROPOUT if chance.random() < DROPOUT_SHARE else 0.0
    prompt = vocabulary.prefix + vocabulary.encode(sample.prompt, dropout=dropout)
    answer = [*vocabulary.encode(sample.answer), EOS_ID]
    if chance.random() < CUT_SHARE:
        answer = answer[: chance.randint(*CUT_TOKENS)]
    return prompt + answer, len(prompt)


def _report(scores: Sequence[Scored]) -> None:
    for one in scores:
        if not one.is_right:
            print(f"wrong: {one.question.turns} -> {one.answer!r}")
    groups = {
        "en": [one for one in scores if one.question.language == "en" and len(one.question.turns) == 1],
        "zh": [one for one in scores if one.question.language == "zh" and len(one.question.turns) == 1],
        "two turns": [one for one in scores if len(one.question.turns) == 2],
        "all": list(scores),
    }
    for name, members in groups.items():
        num_right = sum(one.is_right for one in members)
        print(f"{name}: {num_right} of {len(members)} right ({num_right / len(members):.1%})")


if __name__ == "__main__":
    main()
