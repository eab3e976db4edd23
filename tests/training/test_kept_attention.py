"""Checkpoints that keep what attention returned: the same gradients to the bit, and no attention computed twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scaled_rope.errors import ConfigError
from scaled_rope.training.kept_attention import is_attention
from scaled_rope.training.mlp_tiles import tile_mlps
from scaled_rope.training.model import SummedLoss, add_lora, enable_checkpointing
from tests.helpers.training_recipes import recipe

Make = Callable[..., Any]


class _Attention(TorchDispatchMode):
    """Counts attention kernels of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs += is_attention(func)
        return func(*args, **(kwargs or {}))


def _train(model: Any, tokens: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], int, int]:
    """Loss, gradients, and attention kernels that ran forward in the forward pass and in the backward pass."""
    module = SummedLoss(model)
    with _Attention() as forward:
        loss = module(tokens[:, :-1], tokens[:, 1:], torch.ones(tokens[:, 1:].shape))
    with _Attention() as backward:
        loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach(), gradients, forward.runs, backward.runs


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tiles", [1, 3])
def test_gradients_are_the_same_and_attention_runs_once(
    tiny_model: Make, tokens: torch.Tensor, family: str, lora: bool, tiles: int
) -> None:
    found = {}
    for keep in (False, True):
        model = tiny_model(family, attn_implementation="sdpa").train()
        torch.manual_seed(1)
        model = add_lora(model, False) if lora else model
        enable_checkpointing(model, recipe(gradient_checkpointing=True, keep_attention=keep))
        tile_mlps(model, tiles)
        found[keep] = _train(model, tokens)
    layers = model.config.num_hidden_layers
    assert found[False][2:] == (layers, layers)
    assert found[True][2:] == (layers, 0)
    assert torch.equal(found[True][0], found[False][0])
    assert len(found[True][1]) == len(found[False][1]) > 0
    for one, two in zip(found[True][1], found[False][1], strict=True):
        assert torch.equal(one, two)


def test_several_passes_may_be_open_at_once(tiny_model: Make, tokens: torch.Tensor) -> None:
    """As in a loss that is the sum of two passes: each checkpoint has storage of its own."""
    gradients = []
    for keep in (False, True):
        model = tiny_model().train()
        enable_checkpointing(model, recipe(gradient_checkpointing=True, keep_attention=keep))
        (model(tokens).logits.sum() + model(tokens.flip(-1)).logits.sum()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_attention_without_a_kernel_is_refused_at_the_first_pass(tiny_model: Make, tokens: torch.Tensor) -> None:
    model = tiny_model(attn_implementation="eager").train()
    enable_checkpointing(model, recipe(gradient_checkpointing=True, keep_attention=True))
    with torch.no_grad():
        model(tokens)  # nothing is checkpointed here
    with pytest.raises(ConfigError, match="^keep_attention true is not possible with attention eager: no"):
        model(tokens)


def test_attention_kernels_are_told_by_their_names() -> None:
    """Those of torch; and of flash-attn 2 and 3, and of the hub's, as their packages register them."""
    aten = torch.ops.aten
    for name in ("flash_attention", "efficient_attention", "flash_attention_for_cpu", "cudnn_attention"):
        assert is_attention(getattr(aten, f"_scaled_dot_product_{name}").default)
        backward = getattr(aten, f"_scaled_dot_product_{name}_backward", None)
        assert backward is None or not is_attention(backward.default)
    assert not is_attention(aten.mm.default)
    assert not is_attention(aten.scaled_dot_product_attention)  # a packet, not an operator
    registered = (
        ("flash_attn", "_flash_attn_forward", "_flash_attn_backward"),
        ("flash_attn", "_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        ("flash_attn_3", "fwd", "bwd"),
        ("flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
        ("_flash_attn2_0ab1c2", "fwd", "bwd"),
    )
    for namespace, forward, backward in registered:
        library = torch.library.Library(f"test_of_{namespace}", "FRAGMENT")
        for name, expected in ((forward, True), (backward, False)):
            library.define(f"{name}(Tensor q) -> Tensor")
            assert is_attention(getattr(getattr(torch.ops, f"test_of_{namespace}"), name).default) is expected
        library._destroy()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_checkpointing": False}, "false without gradient_checkpointing"),
        ({"offload_activations": True}, "false with offload_activations"),
        ({"context_parallel": 2}, "false with context_parallel"),
    ],
)
def test_what_it_cannot_go_with_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"keep_attention = True is not allowed; {message}"):
        recipe(keep_attention=True, **fields)


def test_dropout_of_attention_is_refused(tiny_model: Make) -> None:
    """Attention that does not run again draws no numbers, and what comes after it in the layer would draw others."""
    model = tiny_model(attention_dropout=0.1).train()
    with pytest.raises(ConfigError, match="keep_attention true is not allowed with attention_dropout 0.1: dropout in"):
        enable_checkpointing(model, recipe(gradient_checkpointing=True, keep_attention=True))
