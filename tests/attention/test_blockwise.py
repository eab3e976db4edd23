"""Blockwise attention against a float64 softmax, and through a model against PyTorch's own kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from scaled_rope import load_model
from scaled_rope.attention.backends import resolve_attention
from scaled_rope.attention.blockwise import blockwise_attention
from scaled_rope.checkpoint import DEFAULT_MODEL
from scaled_rope.errors import ConfigError
from scaled_rope.patching.loss import hidden_states

EPSILON = 2.0**-8  # of a bfloat16: half of the step between neighbours near 1


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The definition in float64, all scores at once."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(groups, dim=1) for x in (k, v))
    scores = scale * q.double() @ k.transpose(-1, -2)
    length = q.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(hidden, -torch.inf).softmax(dim=-1) @ v


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("length", [2, 16, 37])
def test_equals_the_definition(heads: int, kv_heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, heads, length, 24, generator=generator).bfloat16()
    # Not contiguous, as heads split off a projection are.
    k, v = (torch.randn(2, length, kv_heads, 24, generator=generator).bfloat16().transpose(1, 2) for _ in range(2))
    expected = reference(q, k, v, 0.2)
    found = blockwise_attention(q, k, v, 0.2, block=16).double()
    # Rounded are: q * scale (relative error EPSILON, so scores are off by EPSILON * |score| <= 0.02 and weights by a
    # share of 0.02), the weights and the output (EPSILON each). Values reach 3.5.
    scores = (0.2 * q.double() @ k.double().repeat_interleave(heads // kv_heads, 1).transpose(-1, -2)).abs().max()
    bound = (2 * EPSILON * float(scores) + 2 * EPSILON) * float(v.double().abs().max())
    assert (found - expected).abs().max() < bound
    if length > 2:
        assert (found - reference(q.flip(2), k, v, 0.2)).abs().max() > 2 * bound  # the bound can tell


def test_precision_of_other_products_is_left_alone() -> None:
    before = torch.get_float32_matmul_precision()
    blockwise_attention(*(torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3)), 0.3)
    assert torch.get_float32_matmul_precision() == before


def test_in_a_model_it_is_the_fused_kernel_to_bfloat16_noise() -> None:
    ids = torch.arange(700)[None] % 400 + 3
    ours, theirs = (
        load_model(str(DEFAULT_MODEL), scaling="yarn:8", dtype="bfloat16", device="cpu", attn_implementation=name)
        for name in ("blockwise", "sdpa")
    )
    exact = load_model(str(DEFAULT_MODEL), scaling="yarn:8", device="cpu")
    with torch.inference_mode():
        a, b, c = (hidden_states(model, ids).float() for model in (ours, theirs, exact))
    noise = (b - c).norm()
    assert 0 < (a - b).norm() < 2 * noise  # two roundings of the same numbers
    assert (a - c).norm() < 1.5 * noise


@pytest.mark.parametrize("case", ["padding", "cache", "gradients", "window"])
def test_what_it_cannot_do_goes_to_the_fused_kernel(case: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    family = "mistral" if case == "window" else "llama"
    options = {"sliding_window": 8} if case == "window" else {}
    resolve_attention("blockwise", torch.device("cpu"), "bfloat16")
    found = []
    for name in ("blockwise", "sdpa"):
        model = tiny_model(family, **options).bfloat16()
        model.set_attn_implementation(name)
        ids = torch.arange(1, 33).view(2, 16)
        mask = torch.ones_like(ids)
        if case == "padding":
            mask[0, :5] = 0
        if case == "gradients":
            model(ids).logits.float().square().sum().backward()
            found.append(model.model.embed_tokens.weight.grad)
            continue
        with torch.no_grad():
            output = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
            rest = model(ids[:, 9:], attention_mask=mask, past_key_values=output.past_key_values)
        found.append(rest.logits if case == "cache" else model(ids, attention_mask=mask).logits.detach())
    if case == "cache":
        # The first nine positions went through the blocks, the others through the fused kernel.
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.05 * float(found[1].abs().max()))
    else:
        assert torch.equal(found[0], found[1])


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_refused_elsewhere(device: str, dtype: str) -> None:
    with pytest.raises(ConfigError, match="attention 'blockwise' needs bfloat16 on a CPU, not"):
        resolve_attention("blockwise", torch.device(device), dtype)
