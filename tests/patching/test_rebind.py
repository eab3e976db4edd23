"""Names of a module's globals bound anew for one module."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scaled_rope import ConfigError, patch_model, unpatch_model
from scaled_rope.patching.rebind import APPLY, bound, callers, calls, original, rebind
from tests.helpers.models import Make
from tests.helpers.rotary_models import SAME, logits


def test_rebinding_several_names_and_taking_them_back(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    before = logits(model, tokens)
    module = callers(model, APPLY)[1]

    def unrotated(q: Tensor, k: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        return q, k

    def silent(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return torch.zeros_like(args[1]).transpose(1, 2), None

    assert rebind(module, APPLY, None) is None and "forward" not in vars(module)
    assert rebind(module, APPLY, unrotated) is None and bound(module, APPLY) is unrotated
    without = logits(model, tokens)
    assert not torch.equal(without, before)
    model.set_attn_implementation("eager")
    eager = logits(model, tokens)
    rebind(module, "eager_attention_forward", silent)
    assert not torch.equal(logits(model, tokens), eager)
    assert rebind(module, "eager_attention_forward", None) is silent
    assert torch.equal(logits(model, tokens), eager)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, tokens), without)
    assert rebind(module, APPLY, None) is unrotated and "forward" not in vars(module)
    assert torch.equal(logits(model, tokens), before)
    with pytest.raises(ConfigError, match="calls no rotate"):
        rebind(module, "rotate", unrotated)
    assert not calls(module, "rotate")


def test_rebinding_under_the_hooks_of_accelerate(tiny_model: Make, tokens: Tensor) -> None:
    """Hooks that move weights replace a module's forward and keep the one before: that is the one to rebind."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = tiny_model()
    before = logits(model, tokens)
    seen = []

    class Hook(ModelHook):  # type: ignore[misc]
        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    for module in callers(model, APPLY):
        add_hook_to_module(module, Hook())
    patch_model(model, "default", kernel="torch")
    assert (logits(model, tokens) - before).abs().max() < SAME
    assert len(seen) == 2 and all(bound(module, APPLY) is not original(module, APPLY) for module in seen)
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and len(seen) == 4
    patch_model(model, "default", kernel="torch")
    for module in callers(model, APPLY):
        remove_hook_from_module(module)
        assert bound(module, APPLY) is not original(module, APPLY)
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and len(seen) == 4
