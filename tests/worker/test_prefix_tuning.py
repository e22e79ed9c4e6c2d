"""P-tuning v2 over ChatGLM2, against the published formulas written out in plain torch."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fastchat.engine.events import FinishReason
from fastchat.errors import CheckpointError
from fastchat.models.stored_form import Quantization
from fastchat.worker.config import ModelSpec
from fastchat.worker.model_groups import group_models, planned_group
from tests.adapters import base_tensors, write_lora
from tests.checkpoints import write_checkpoint, write_weights
from tests.worker.test_lora import answer_ids, greedy, make, request, run_all

LAYERS, HEADS, GROUPS, HEAD, HIDDEN = 2, 4, 2, 16, 48
KV = LAYERS * 2 * GROUPS * HEAD
NUM_SLOTS = 11


def write_prefix(folder, base, *, projection=False, layout="bin", num_slots=NUM_SLOTS, seed=5):
    """A folder as ChatGLM2's own training script leaves it; returns the prefix that it stands for. # (P, KV)"""
    folder.mkdir()
    config = json.loads((base / "config.json").read_text())
    config |= {"pre_seq_len": num_slots, "prefix_projection": projection}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"embedding.weight": 2 * noise(num_slots, KV)}
    if projection:
        tensors |= {"trans.0.weight": noise(HIDDEN, KV) / KV**0.5, "trans.0.bias": noise(HIDDEN)}
        tensors |= {"trans.2.weight": noise(KV, HIDDEN) / 4, "trans.2.bias": noise(KV)}
    write_weights(folder, {f"transformer.prefix_encoder.{name}": t for name, t in tensors.items()}, 1, layout)
    if not projection:
        return tensors["embedding.weight"]
    inner = torch.tanh(linear(tensors["embedding.weight"], tensors["trans.0.weight"], tensors["trans.0.bias"]))
    return linear(inner, tensors["trans.2.weight"], tensors["trans.2.bias"])


def published_logits(weights: dict[str, Tensor], prefix: Tensor, token_ids: list[int]) -> Tensor:
    """ChatGLM2's forward pass over one sequence; the prefix is what came before, at no position."""
    hidden = weights["transformer.embedding.word_embeddings.weight"][token_ids]
    past = prefix.view(len(prefix), LAYERS * 2, GROUPS, HEAD)  # layer 0's keys, its values, layer 1's keys, ...
    count = len(token_ids)
    sees = torch.cat([torch.ones(count, len(prefix)), torch.ones(count, count).tril()], dim=1).bool()
    for layer in range(LAYERS):
        own = {
            name.removeprefix(f"transformer.encoder.layers.{layer}."): value
            for name, value in weights.items()
            if f"layers.{layer}." in name
        }
        rows = linear(
            normed(hidden, own["input_layernorm.weight"]),
            own["self_attention.query_key_value.weight"],
            own["self_attention.query_key_value.bias"],
        )
        query, key, value = rows.split([HEADS * HEAD, GROUPS * HEAD, GROUPS * HEAD], dim=1)
        query, key = rotated(query.view(count, HEADS, HEAD)), rotated(key.view(count, GROUPS, HEAD))
        keys = torch.cat([past[:, 2 * layer], key]).repeat_interleave(HEADS // GROUPS, dim=1)
        values = torch.cat([past[:, 2 * layer + 1], value.view(count, GROUPS, HEAD)])
        values = values.repeat_interleave(HEADS // GROUPS, dim=1)
        scores = torch.einsum("qhd,khd->hqk", query, keys) / HEAD**0.5
        weight = scores.masked_fill(~sees, -torch.inf).softmax(dim=-1)
        attended = torch.einsum("hqk,khd->qhd", weight, values).reshape(count, HEADS * HEAD)
        hidden = hidden + linear(attended, own["self_attention.dense.weight"])
        gate, up = linear(
            normed(hidden, own["post_attention_layernorm.weight"]), own["mlp.dense_h_to_4h.weight"]
        ).chunk(2, dim=1)
        hidden = hidden + linear(silu(gate) * up, own["mlp.dense_4h_to_h.weight"])
    final = normed(hidden[-1:], weights["transformer.encoder.final_layernorm.weight"])
    return linear(final, weights["transformer.output_layer.weight"])[0]


def normed(rows: Tensor, weight: Tensor) -> Tensor:
    return weight * rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + 1e-5)


def rotated(heads: Tensor) -> Tensor:
    """Pairs (2i, 2i + 1) of the first half of a head, at positions 0, 1, 2, ..."""
    width = HEAD // 2
    angles = torch.arange(len(heads))[:, None] / 10000 ** (torch.arange(0, width, 2) / width)
    cosines, sines = angles.cos()[:, None], angles.sin()[:, None]
    even, odd = heads[..., 0:width:2], heads[..., 1:width:2]
    turned = torch.stack([even * cosines - odd * sines, odd * cosines + even * sines], dim=-1).flatten(-2)
    return torch.cat([turned, heads[..., width:]], dim=-1)


def published_greedy(weights, prefix, prompt, num_tokens=12):
    token_ids = list(prompt)
    for _ in range(num_tokens):
        token_ids.append(int(published_logits(weights, prefix, token_ids).argmax()))
    return token_ids[len(prompt) :]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("prefix")
    base = write_checkpoint(root / "chatglm2-6b", "chatglm2")
    plain = write_prefix(root / "plain", base)
    projected = write_prefix(root / "projected", base, projection=True, layout="safetensors", num_slots=16, seed=6)
    write_lora(root / "lora", base, ("query_key_value", "dense"))
    return {"root": root, "base": base, "plain": plain, "projected": projected, "weights": base_tensors(base)}


def adapted(written, *names, **options):
    return make(written["base"], adapters=[(name, written["root"] / name) for name in names], **options)


@pytest.mark.parametrize("name", ["plain", "projected"])
@pytest.mark.parametrize("lean", [True, False], ids=["lean", "own-layers"])
def test_a_prefix_gives_what_the_published_formulas_give(written, name, lean):
    """Token for token in float32, for prompts of one chunk and of several, and not what the base gives."""
    engine = adapted(written, name, lean=lean)
    for prompt in ([5], [30, 31], list(range(40, 90))):
        expected = published_greedy(written["weights"], written[name], prompt)
        assert greedy(engine, prompt, name) == expected
        assert greedy(engine, prompt, name) == expected, "from the prefix cache"
    unchanged = published_greedy(written["weights"], torch.zeros(0, KV), [5])
    assert greedy(engine, [5]) == unchanged != greedy(engine, [5], name)


def test_prefixes_lora_and_the_base_share_one_batch(written):
    """Mixed freely, each has the text that it has alone; equal prompts of one prefix share its blocks."""
    names = ("", "plain", "projected", "lora")
    engine = adapted(written, *names[1:])
    prompts = {f"{name}-{n}": [9 + n + i for i in range(6 + 11 * n)] for n in range(3) for name in names}
    together = run_all(engine, [request(key, prompt, key.split("-")[0]) for key, prompt in prompts.items()])
    for key, prompt in prompts.items():
        name = key.split("-")[0]
        assert answer_ids(together[key]) == greedy(adapted(written, *[name][: bool(name)]), prompt, name), key
    before = engine.stats.num_cached_tokens
    assert greedy(engine, prompts["plain-2"], "plain") == answer_ids(together["plain-2"])
    assert engine.stats.num_cached_tokens - before >= 16


def test_a_preempted_prefix_is_filled_again(written):
    """A pool too small for all: who was put back begins anew, with its prefix, and gets the same text."""
    engine = adapted(written, "plain", kv_cache_bytes=14 * 8 * 2 * LAYERS * GROUPS * HEAD * 4)
    prompts = {str(n): [20 + n + i for i in range(20)] for n in range(4)}
    together = run_all(engine, [request(key, prompt, "plain", num_tokens=30) for key, prompt in prompts.items()])
    assert engine.stats.num_preemptions > 0
    for key, prompt in prompts.items():
        assert answer_ids(together[key]) == greedy(adapted(written, "plain"), prompt, "plain", num_tokens=30)
    too_long = engine.add(request("long", range(5, 85), "plain", num_tokens=30))
    assert too_long.finish_reason is FinishReason.ERROR
    assert "prefix" in too_long.error


def test_a_prefix_works_over_a_quantized_base(written):
    """Keys and values are not quantized; the text differs from the base's."""
    engine = adapted(written, "plain", quantization=Quantization("int8"))
    assert greedy(engine, [5, 6], "plain") != greedy(engine, [5, 6])


def test_a_prefix_is_recognised_by_content_and_counted(written, tmp_path):
    """Served under its folder's name over its base, its bytes in the plan; another base's prefix is refused."""
    groups = group_models([ModelSpec(written["root"] / name) for name in ("chatglm2-6b", "plain")])
    assert [group.all_names for group in groups] == [("chatglm2-6b", "plain")]
    assert planned_group(groups[0]).num_adapter_values == NUM_SLOTS * KV
    other = write_checkpoint(tmp_path / "other", "chatglm2", config={"num_layers": 3})
    with pytest.raises(CheckpointError, match="give its own base"):
        make(other, adapters=[("plain", written["root"] / "plain")])
