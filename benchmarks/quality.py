"""What smaller weights cost: logits of each form against float32, on the same token ids.

    python benchmarks/quality.py                        the demo model and two layers of ChatGLM2-6B's shape
    python benchmarks/quality.py --model FOLDER         another checkpoint (again for more)
    python benchmarks/quality.py --reference FOLDER     a folder of checkpoints with their `expected.json`

Relative error: the norm of the difference of all logits over the norm of float32's. Top-1: the share of places where
the most probable token is the same. Perplexity: for the demo model that of its kind of dialogue, answers only, sampled
anew; elsewhere that of text as the float32 model itself would write it, computed from its distributions (so nothing is
drawn by chance, and the figure of float32 is the lowest there can be). Writes a Markdown table.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from fastchat.models.checkpoint import Checkpoint  # noqa: E402 - the line above makes `scripts` known
from fastchat.models.precision import DTypeName  # noqa: E402
from fastchat.models.stored_form import Quantization  # noqa: E402
from fastchat.models.tokenizer import load_tokenizer  # noqa: E402
from fastchat.models.weights import load_model  # noqa: E402
from scripts.demo.dialogues import Dialogues  # noqa: E402
from scripts.demo.heldout import load_held_out  # noqa: E402
from scripts.demo.texts import Texts  # noqa: E402

DEMO = ROOT / "src" / "fastchat" / "models" / "demo" / "chatglm2-demo"
NUM_DIALOGUES = 60
NUM_RANDOM_IDS = 256
FORMS: tuple[tuple[str, DTypeName, Quantization | None], ...] = (
    ("float32", "float32", None),
    ("bfloat16", "bfloat16", None),
    ("int8", "float32", Quantization("int8")),
    ("int8, bfloat16", "bfloat16", Quantization("int8")),
    *((f"int4, groups of {size}", "float32", Quantization("int4", size)) for size in (32, 64, 128)),
    ("int4, groups of 64, bfloat16", "bfloat16", Quantization("int4", 64)),
)


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids; those from `start` on are scored. Without `is_real` they are noise, and no next token is right."""

    ids: Sequence[int]
    start: int = 1
    is_real: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """One form of one model."""

    relative_error: float
    agreement: float
    perplexity: float
    num_weight_bytes: int


def score(checkpoint: Checkpoint, texts: Sequence[Text]) -> Iterator[tuple[str, Score]]:
    """Every form, float32 first."""
    exact: list[Tensor] = []
    for label, dtype, quantization in FORMS:
        model = load_model(checkpoint, dtype=dtype, quantization=quantization, on_progress=lambda *_: None)
        num_bytes = sum(value.numel() * value.element_size() for value in model.parameters())
        with torch.inference_mode():
            logits = [
                model(input_ids=torch.tensor([text.ids])).logits[0, text.start - 1 : -1].float() for text in texts
            ]
        del model
        gc.collect()
        exact = exact or logits
        yield label, compare(texts, exact, logits, num_bytes)


def compare(texts: Sequence[Text], exact: Sequence[Tensor], found: Sequence[Tensor], num_bytes: int) -> Score:
    """Sums over all places of all texts."""
    error = sum(float((a - b).square().sum(dtype=torch.float64)) for a, b in zip(exact, found, strict=True))
    norm = sum(float(a.square().sum(dtype=torch.float64)) for a in exact)
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(exact, found, strict=True))
    num_places = sum(len(a) for a in exact)
    surprise = 0.0
    for text, a, b in zip(texts, exact, found, strict=True):
        losses = b.log_softmax(-1)
        if text.is_real:
            surprise -= float(losses.gather(1, torch.tensor(text.ids[text.start :])[:, None]).sum())
        else:
            surprise -= float((a.softmax(-1) * losses).sum())
    return Score((error / norm) ** 0.5, same / num_places, float(torch.tensor(surprise / num_places).exp()), num_bytes)


def demo_texts(checkpoint: Checkpoint) -> list[Text]:
    """Dialogues as the demo model was trained on, drawn anew."""
    tokenizer = load_tokenizer(checkpoint)
    questions = [turn for question in load_held_out() for turn in question.turns]
    dialogues = Dialogues(Texts.load(), questions, seed=20260)
    texts = []
    for sample in (dialogues.sample() for _ in range(NUM_DIALOGUES)):
        prompt = tokenizer.encode(sample.prompt)
        whole = tokenizer.encode(sample.prompt + sample.answer)
        start = next(index for index in range(len(whole)) if index >= len(prompt) or whole[index] != prompt[index])
        texts.append(Text(whole, max(1, start), is_real=True))
    return texts


def reference_texts(folder: Path) -> list[Text]:
    """The prompts with the original code's answers."""
    expected = json.loads((folder / "expected.json").read_text())
    return [Text([*case["input_ids"], *case["greedy_ids"]]) for case in [*expected["plain"], *expected["chat"]]]


def random_texts(checkpoint: Checkpoint) -> list[Text]:
    """Noise, for models that are noise."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, min(60000, checkpoint.vocab_size), (NUM_RANDOM_IDS,), generator=generator)
    return [Text(ids.tolist())]


def print_rows(name: str, checkpoint: Checkpoint, texts: Sequence[Text]) -> None:
    """The part of the table for one model."""
    for label, result in score(checkpoint, texts):
        print(
            f"| {name} | {label} | {result.num_weight_bytes / 1e6:,.1f} | {100 * result.relative_error:.2f} % "
            f"| {100 * result.agreement:.1f} % | {result.perplexity:.3f} |",
            flush=True,
        )
        name = ""


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a checkpoint, scored on noise")
    parser.add_argument("--reference", type=Path, help="a folder of checkpoints with expected.json")
    parser.add_argument("--layers", type=int, default=2, help="layers of the 6B shape, 0 for none (default: 2)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="rows of its embedding and head (default: 8192)")
    arguments = parser.parse_args()
    print("| model | weights | MB | relative error | same top-1 | perplexity |\n|---|---|---|---|---|---|", flush=True)
    demo = Checkpoint.open(DEMO)
    print_rows("demo", demo, demo_texts(demo))
    for folder in sorted(arguments.reference.iterdir()) if arguments.reference else []:
        if (folder / "expected.json").exists():
            print_rows(folder.name, Checkpoint.open(folder), reference_texts(folder))
    for folder in arguments.model:
        checkpoint = Checkpoint.open(folder)
        print_rows(checkpoint.name, checkpoint, random_texts(checkpoint))
    if arguments.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "chatglm2-6b"
            sizes = ["--layers", str(arguments.layers), "--vocabulary", str(arguments.vocabulary)]
            subprocess.run(
                [sys.executable, str(ROOT / "benchmarks/make_checkpoint.py"), str(folder), *sizes], check=True
            )
            checkpoint = Checkpoint.open(folder)
            print_rows(f"6B shape, {arguments.layers} layers", checkpoint, random_texts(checkpoint))


if __name__ == "__main__":
    main()
