"""The rotary kernel inside models: every family computes what it did, and only where it was asked for."""

from __future__ import annotations

import copy
import importlib.util
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.small_models import MODEL_TYPES, small_model
from scaled_rope import ConfigError, RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.families import ADAPTERS
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.patching.patch import patched_kernel
from scaled_rope.patching.rebind import APPLY, bound, callers, original
from scaled_rope.patching.rotary_kernel import resolve_kernel
from tests.helpers.models import DETECTED, FAMILIES, Make
from tests.helpers.rotary_models import SAME, logits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.parametrize("family", [*FAMILIES, *DETECTED])
def test_every_family_computes_what_it_did(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model = tiny_model(family)
    patch_model(model, "yarn:4", kernel="none")
    plain = logits(model, tokens)
    modules = callers(model, APPLY)
    kinds = list(map(type, modules))
    assert modules and not any("forward" in vars(module) for module in modules)
    report = patch_model(model, "yarn:4", kernel="torch")
    assert report.kernel == patched_kernel(model) == "torch" and not [n for n in report.notes if "kernel" in n]
    assert all(bound(module, APPLY) is not original(module, APPLY) for module in modules)
    assert (logits(model, tokens) - plain).abs().max() < SAME
    # With positions out of order, and a cache: one token at a time, at an offset.
    ids = torch.randperm(tokens.shape[1])[None].expand(2, -1)
    moved = logits(model, tokens, position_ids=ids)
    unpatch_model(model)
    assert not any("forward" in vars(module) for module in modules) and patched_kernel(model) is None
    assert list(map(type, modules)) == kinds
    patch_model(model, "yarn:4", kernel="none")
    assert torch.equal(logits(model, tokens), plain)
    assert (logits(model, tokens, position_ids=ids) - moved).abs().max() < SAME


# Triton's interpreter is slow, and what it is given does not depend on the family.
WITH_TRITON = list(ADAPTERS) if torch.cuda.is_available() else list(ADAPTERS)[::4]


@pytest.mark.parametrize(
    ("backend", "family"), [("torch", name) for name in ADAPTERS] + [("triton", name) for name in WITH_TRITON]
)
def test_bf16_is_within_its_own_noise(tiny_model: Make, tokens: Tensor, family: str, backend: str) -> None:
    """Vanilla bf16 is some way off float32: its noise. Ours rounds the rotation once instead of four times (Triton's
    interpreter truncates once), so it is about as far off, in another direction: at most the sum of both apart. The
    median over tokens, because noise may tip the choice of an expert."""
    if backend == "triton" and not TRITON:
        pytest.skip("no triton")
    tokens = tokens[:1, :24].to(DEVICE)
    exact = tiny_model(family).to(DEVICE)
    patch_model(exact, "yarn:4", kernel="none")
    plain = tiny_model(family).to(DEVICE).bfloat16()
    patch_model(plain, "yarn:4", kernel="none")
    fused = copy.deepcopy(plain)
    assert patch_model(fused, "yarn:4", kernel=backend).kernel == backend
    wanted, one, other = (logits(model, tokens) for model in (exact, plain, fused))
    noise, ours, apart = ((a - b).norm(dim=-1).median() for a, b in ((one, wanted), (other, wanted), (one, other)))
    assert 0 < noise < 0.05 * wanted.norm(dim=-1).median()  # it is noise
    assert ours <= 1.5 * noise  # two draws of the same size from one distribution of 24 tokens
    assert apart <= noise + ours


def test_models_and_their_copies_differ(tiny_model: Make, tokens: Tensor) -> None:
    """Rebinding is for one model: another of the class keeps its own function, a copy has its own modules."""
    plain, fused = tiny_model(), tiny_model()
    untouched = logits(plain, tokens)
    patch_model(fused, "yarn:4", kernel="torch")
    scaled = logits(fused, tokens)
    assert torch.equal(logits(plain, tokens), untouched)
    twin = copy.deepcopy(fused)
    pairs: Any = zip(callers(fused, APPLY), callers(twin, APPLY), strict=True)
    for module, other in pairs:
        assert other.forward.__self__ is other and module.forward.__self__ is module
    unpatch_model(fused)
    assert torch.equal(logits(fused, tokens), untouched) and torch.equal(logits(twin, tokens), scaled)
    unpatch_model(twin)
    assert torch.equal(logits(twin, tokens), untouched)


def test_training_with_activation_checkpointing(tiny_model: Make, tokens: Tensor) -> None:
    gradients = []
    for kernel in ("none", "torch"):
        model = tiny_model()
        patch_model(model, "yarn:4", kernel=kernel)
        # renamed in transformers 5.23
        enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.train()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        scale = gradient.abs().max()
        # float32 sums over 96 tokens in another order
        assert scale > 0 and (gradient - gradients[1][name]).abs().max() < 1e-4 * scale


def test_compiles_without_a_break(tiny_model: Make, tokens: Tensor) -> None:
    """Each model by its own functions, though they share the code: no guard on the source file's globals."""
    plain, fused = tiny_model(), tiny_model()
    patch_model(plain, "yarn:4", kernel="none")
    patch_model(fused, "yarn:8", kernel="torch")
    for model in (fused, plain, fused):
        torch.compiler.reset()  # models of other tests count towards the limit of recompilations
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert (logits(compiled, tokens) - logits(model, tokens)).abs().max() < SAME


@pytest.mark.parametrize(
    "scaling, dropped",
    [("dynamic-yarn", ()), ({"full_attention": "yarn:4"}, (1,)), ("default", (0, 1))],
)
def test_with_everything_else(tiny_model: Make, tokens: Tensor, scaling: Any, dropped: tuple[int, ...]) -> None:
    """Scales per row, tables per layer type, layers without rotation."""
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    results = []
    for kernel in ("none", "torch"):
        model = tiny_model("qwen3")
        patch_model(model, scaling, drop_layers=dropped, kernel=kernel)
        results.append(logits(model, tokens, attention_mask=mask)[mask.bool()])
    assert (results[0] - results[1]).abs().max() < SAME


def test_the_saved_model_knows_nothing_of_it(tiny_model: Make, tmp_path: Any) -> None:
    plain, fused = tiny_model(), tiny_model()
    patch_model(plain, "yarn:4", kernel="none")
    patch_model(fused, "yarn:4", kernel="torch")
    assert plain.state_dict().keys() == fused.state_dict().keys()
    assert plain.config.to_dict() == fused.config.to_dict()


def test_when_a_kernel_is_installed(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCALED_ROPE_KERNEL", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    model = tiny_model()
    if not torch.cuda.is_available():
        assert patch_model(model, "yarn:4").kernel is None and resolve_kernel("auto") is None
        with pytest.raises(ConfigError, match="triton' needs"):
            patch_model(model, "yarn:8", kernel="triton")
        assert not vars(callers(model, APPLY)[0]).get("forward")
    monkeypatch.setenv("SCALED_ROPE_KERNEL", "torch")
    assert patch_model(model, "yarn:4").kernel == "auto"
    assert patch_model(model, "yarn:4", kernel="none").kernel is None
    with pytest.raises(ConfigError, match="unknown kernel 'tirton'; did you mean 'triton'"):
        patch_model(model, "yarn:4", kernel="tirton")


def test_a_function_that_computes_something_else_stays(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    before = logits(model, tokens)
    for module in callers(model, APPLY):
        code: Any = inspect.unwrap(type(module).forward)
        own = dict(code.__globals__, **{APPLY: lambda q, k, cos, sin: (q * cos, k * sin)})
        module.forward = type(code)(code.__code__, own, argdefs=code.__defaults__).__get__(module)
    other = logits(model, tokens)
    assert not torch.equal(other, before)
    with pytest.raises(ConfigError, match="kernel='torch': not for this llama model, its apply_rotary_pos_emb is not"):
        patch_model(model, "yarn:4", kernel="torch")
    assert torch.equal(logits(model, tokens), other)


@pytest.mark.skipif("deepseek_v3" not in MODEL_TYPES, reason="a release of transformers without this family")
def test_attention_that_may_call_another_function_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = small_model("deepseek_v3", num_hidden_layers=1), torch.arange(3, 43)[None]
    with pytest.raises(ConfigError, match="this deepseek_v3 model, its attention may call apply_rotary_pos_emb_inter"):
        patch_model(model, "yarn:4", kernel="torch")
    patch_model(model, "yarn:4", kernel="none")
    wanted = logits(model, ids)
    monkeypatch.setenv("SCALED_ROPE_KERNEL", "torch")
    report = patch_model(model, "yarn:4")
    assert report.kernel is None and "apply_rotary_pos_emb_interleave" in report.notes[-1]
    assert torch.equal(logits(model, ids), wanted)


def test_scalings_change_and_the_kernel_stays(tiny_model: Make) -> None:
    model = tiny_model()
    own = RopeScaling.from_config(model.config)
    apply_scaling(model, own)
    assert patched_kernel(model) is None
    apply_scaling(model, own, kernel="torch")  # unscaled, but a kernel is asked for
    assert patched_kernel(model) == "torch"
    apply_scaling(model, RopeScaling.from_spec("yarn:4", own))
    assert patched_kernel(model) == "torch"
    apply_scaling(model, own, kernel="none")
    assert patched_kernel(model) is None
