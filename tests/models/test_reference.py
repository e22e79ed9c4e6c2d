"""The outputs of the original ChatGLM code, token for token, in float32 with transformers' plain forward pass."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fastchat.models.chat_template import load_chat_format
from fastchat.models.checkpoint import Checkpoint
from fastchat.models.detokenizer import Detokenizer
from fastchat.models.interface import ChatMessage
from fastchat.models.tokenizer import TemplateTokenizer, load_tokenizer
from fastchat.models.weights import load_model

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
MODELS = ("chatglm2-tiny", "chatglm3-tiny")
NUM_CASES = 15
LOGIT_TOLERANCE = 2e-4
"""The reference is rounded to four places."""

pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference data is not beside the project")


@cache
def loaded(model_name: str) -> tuple[Checkpoint, TemplateTokenizer, Any]:
    checkpoint = Checkpoint.open(REFERENCE / model_name)
    return checkpoint, load_tokenizer(checkpoint), load_model(checkpoint, dtype="float32")


@cache
def cases_of(model_name: str) -> list[dict[str, Any]]:
    expected = json.loads((REFERENCE / model_name / "expected.json").read_text(encoding="utf-8"))
    cases: list[dict[str, Any]] = expected["plain"] + expected["chat"]
    return cases


def prompt_ids(model_name: str, case: dict[str, Any]) -> list[int]:
    checkpoint, tokenizer, _ = loaded(model_name)
    if "text" in case:
        return tokenizer.encode(case["text"])
    messages: list[ChatMessage] = []
    for entry in case["history"]:
        if isinstance(entry, dict):
            tools = tuple(entry.get("tools", ()))
            metadata = entry.get("metadata", "")
            messages.append(ChatMessage(entry["role"], entry["content"], metadata=metadata, tools=tools))
        else:
            messages += [ChatMessage("user", entry[0]), ChatMessage("assistant", entry[1])]
    messages.append(ChatMessage(case.get("role", "user"), case["query"]))
    return load_chat_format(checkpoint, tokenizer).render(messages)


@pytest.mark.parametrize("model_name", MODELS)
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_prompt_logits_and_greedy_tokens_are_the_originals(model_name: str, index: int) -> None:
    case = cases_of(model_name)[index]
    _, tokenizer, model = loaded(model_name)
    token_ids = prompt_ids(model_name, case)
    assert token_ids == case["input_ids"]
    # One pass over prompt and answer: each best token, given the reference's tokens before it, is the reference's next.
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids + case["greedy_ids"][:-1]])).logits[0, len(token_ids) - 1 :]
    for token_id, logit in case["next_token_top8"]:
        assert logits[0, token_id].item() == pytest.approx(logit, abs=LOGIT_TOLERANCE)
    answer = logits.argmax(dim=-1).tolist()
    assert answer == case["greedy_ids"]
    if "greedy_text" in case:
        assert tokenizer.decode(answer) == case["greedy_text"]
        detokenizer = Detokenizer(tokenizer)
        pushed = "".join(detokenizer.push([token_id]) for token_id in answer) + detokenizer.finish()
        assert pushed == case["greedy_text"]


def test_every_case_is_tested() -> None:
    assert [len(cases_of(model_name)) for model_name in MODELS] == [NUM_CASES, NUM_CASES]


def test_the_real_checkpoints_text_side_opens_without_its_weights() -> None:
    checkpoint = Checkpoint.open(REFERENCE / "chatglm2-6b")
    tokenizer = load_tokenizer(checkpoint)
    assert (checkpoint.max_context, tokenizer.vocab_size) == (32768, 65024)
    assert tokenizer.prefix_ids() == [64790, 64792]
    assert tokenizer.eos_token_ids == {2}
    assert load_chat_format(checkpoint, tokenizer).name == "chatglm2"


def test_role_ids_follow_the_vocabulary() -> None:
    _, tokenizer, _ = loaded("chatglm3-tiny")
    names = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    assert [tokenizer.special_token_id(name) for name in names] == [64794, 64795, 64796, 64797]
    _, chatglm2, _ = loaded("chatglm2-tiny")
    assert chatglm2.special_token_id("<|user|>") is None
