"""A layer's operators against transformers' modules, in every form."""

import pytest
import torch
from transformers import GlmConfig, LlamaConfig
from transformers.models.glm import modeling_glm
from transformers.models.llama import modeling_llama

from fastchat.native import layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = {torch.float32: 2e-6, torch.bfloat16: 2**-6, torch.float16: 2**-9}
SHAPES = [(1, 896), (5, 33), (70, 64), (3, 7), (40, 4096)]


def draw(shape, dtype, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def assert_near(result, expected):
    """Within the last two places of the type, of values of this size: two roundings may each fall the other way."""
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=ULPS[expected.dtype], atol=ULPS[expected.dtype] / 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm_equals_that_of_transformers(form, num_threads, shape, dtype):
    """Alone, and after the residual addition, which is kept."""
    module = modeling_llama.LlamaRMSNorm(shape[1], eps=1e-5).to(dtype).requires_grad_(requires_grad=False)
    module.weight.copy_(draw(shape[1:], dtype, 1))
    rows, residual = draw(shape, dtype, 2), draw(shape, dtype, 3)
    assert_near(layers.rms_norm(rows, module.weight, 1e-5), module(rows))
    expected = residual + rows
    assert_near(layers.add_rms_norm(rows, residual, module.weight, 1e-5), module(expected))
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gated_silu_equals_that_of_transformers(form, shape, dtype):
    """Also far out, where its exponential would overflow."""
    rows = draw((shape[0], shape[1] * 2), dtype)
    rows[0, 0], rows[-1, 1] = 300, -300
    gate, up = rows.chunk(2, dim=-1)
    assert_near(layers.silu_and_multiply(rows), torch.nn.functional.silu(gate) * up)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("family", ["llama", "glm"])
def test_rotary_equals_that_of_transformers(form, family, head_dim, dtype):
    """In place on queries and keys within a packed row; what is not rotated stays."""
    num_tokens, num_heads, num_kv_heads = 37, 6, 2
    packed = draw((num_tokens, (num_heads + 2 * num_kv_heads) * head_dim), dtype)
    before = packed.clone().view(num_tokens, -1, head_dim)
    if family == "llama":
        config = LlamaConfig(hidden_size=num_heads * head_dim, num_attention_heads=num_heads)
        module, apply = modeling_llama.LlamaRotaryEmbedding(config), modeling_llama.apply_rotary_pos_emb
    else:
        config = GlmConfig(hidden_size=num_heads * head_dim, num_attention_heads=num_heads, head_dim=head_dim)
        module, apply = modeling_glm.GlmRotaryEmbedding(config), modeling_glm.apply_rotary_pos_emb
    cosines, sines = module(packed, torch.arange(num_tokens).unsqueeze(0) * 11)
    query, key = before[:, :num_heads].transpose(0, 1), before[:, num_heads:-num_kv_heads].transpose(0, 1)
    expected = apply(query.unsqueeze(0), key.unsqueeze(0), cosines, sines)
    half = cosines.shape[-1] // 2
    heads = packed[:, : (num_heads + num_kv_heads) * head_dim].view(num_tokens, -1, head_dim)
    halves = cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()
    layers.rotate(heads, *halves, is_interleaved=family == "glm")
    assert torch.equal(heads[:, :num_heads].transpose(0, 1), expected[0][0])
    assert torch.equal(heads[:, num_heads:].transpose(0, 1), expected[1][0])
    assert torch.equal(packed.view(num_tokens, -1, head_dim)[:, -num_kv_heads:], before[:, -num_kv_heads:])


def test_bad_numbers_are_seen(form):
    """What is not a number stays none, in its own row alone."""
    rows = draw((3, 64), torch.float32)
    rows[1, 5] = float("nan")
    for result in (layers.rms_norm(rows, torch.ones(64), 1e-5), layers.silu_and_multiply(rows)):
        assert result[1].isnan().any()
        assert result[[0, 2]].isfinite().all()
