"""Names of a module's globals bound anew for one module."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.small_models import small_model
from scaled_rope import ConfigError, patch_model, unpatch_model
from scaled_rope.patching.rebind import APPLY, bound, callers, calls, original, rebind
from tests.helpers.models import Make
from tests.helpers.rotary_models import SAME, logits


def test_rebinding_several_names_and_taking_them_back(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    before = logits(model, tokens)
    module = callers(model, APPLY)[1]
    kind = type(module)

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
    assert rebind(module, APPLY, None) is unrotated and "forward" not in vars(module) and type(module) is kind
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


def _shallow(module: Any) -> Any:
    """A copy of a model as replicas of nn.DataParallel are made, with weights of its own."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else _shallow(child)
    for name, weight in module._parameters.items():
        replica._parameters[name] = None if weight is None else nn.Parameter(2 * weight.detach())
    return replica


@pytest.mark.parametrize(
    ("scaling", "kernel"),
    [
        ("yarn:4", "torch"),
        ("dynamic-yarn", "none"),
        ("dynamic-yarn", "torch"),
        ("yarn:4,attention_temperature=log", "none"),
        ("rerope,window=16", "none"),
    ],
)
def test_shallow_copies_compute_with_their_own_weights(
    tiny_model: Make, tokens: Tensor, scaling: str, kernel: str
) -> None:
    model = tiny_model()
    patch_model(model, scaling, kernel=kernel)
    before = logits(model, tokens)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(2)
    wanted = logits(other, tokens)
    replica = _shallow(model)
    assert torch.equal(logits(replica, tokens), wanted) and not torch.equal(wanted, before)
    assert torch.equal(logits(model, tokens), before)
    with pytest.raises(ConfigError, match="cannot be pickled"):
        pickle.dumps(model)

    attention: Any = callers(model, APPLY)[0]
    single = copy.copy(attention)
    other_attention: Any = callers(replica, APPLY)[0]
    single._modules = {**attention._modules, "q_proj": other_attention.q_proj}
    kind: Any = type(attention)
    assert kind.forward is kind.__mro__[2].forward
    positions, hidden = torch.arange(8)[None], torch.randn(1, 8, model.config.hidden_size)
    tables = model.base_model.rotary_emb(torch.ones(1), positions)
    given = {"hidden_states": hidden, "position_embeddings": tables, "position_ids": positions}
    found, plain = (module(**given, attention_mask=None)[0] for module in (single, attention))
    assert not torch.equal(found, plain)

    unpatch_model(other)
    assert "_LooksUp" not in [kind.__name__ for module in other.modules() for kind in type(module).__mro__]
    assert torch.equal(logits(replica, tokens), wanted) and torch.equal(logits(model, tokens), before)


def test_replicas_that_would_compute_with_other_weights_are_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    for module in callers(model, APPLY):
        module.forward = type(module).forward.__get__(module)  # as libraries do that wrap modules in place
    patch_model(model, "dynamic-yarn")
    logits(model, tokens)
    with pytest.raises(ConfigError, match=r"^nn.DataParallel cannot run .* one process per GPU \(torchrun\)$"):
        logits(_shallow(model), tokens)


def test_replicas_do_not_share_the_rotary_module_of_a_family() -> None:
    """nn.DataParallel runs them at the same time, each on a device of its own."""
    model = small_model("llama4_text")
    patch_model(model, "dynamic-yarn")
    ids = torch.randint(3, 200, (1, 100), generator=torch.Generator().manual_seed(0))
    wanted = logits(model, ids)
    rotary: Any = model.get_submodule("model.rotary_emb")
    rotary.family.inv_freq = None
    replica = _shallow(model)
    with torch.no_grad():
        for weight in replica.parameters():
            weight.div_(2)
    assert torch.equal(logits(replica, ids), wanted) and rotary.family.inv_freq is None
