"""Factors, caps and cuts around the output projection are measured, whatever a family calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.small_models import small_model
from scaled_rope.patching.loss import hidden_states, project, token_nll
from scaled_rope.patching.output_head import OutputHead, output_head
from tests.helpers.families import distance, logits

CASES: list[tuple[str, dict[str, Any], OutputHead]] = [
    ("llama", {}, OutputHead()),
    ("granite", {"logits_scaling": 8.0}, OutputHead(scale=1 / 8)),
    ("granitemoe", {"logits_scaling": 3.0}, OutputHead(scale=1 / 3)),
    ("falcon_h1", {"lm_head_multiplier": 0.3}, OutputHead(scale=0.3)),
    ("cohere", {"logit_scale": 0.0625}, OutputHead(scale=0.0625)),
    ("gemma2", {"final_logit_softcapping": 30.0}, OutputHead(cap=30.0)),
    ("minicpm3", {}, OutputHead(hidden_scale=4.0)),
    ("recurrent_gemma", {"logits_soft_cap": 20.0}, OutputHead(cap=20.0)),
    ("muse_glimmer", {}, OutputHead(scale=26**-0.5, cap=20.0)),
    ("modernbert-decoder", {}, OutputHead(followed=False)),
]


@pytest.fixture(scope="module")
def text() -> Tensor:
    return torch.randint(3, 200, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("model_type", "settings", "wanted"), CASES, ids=[case[0] for case in CASES])
def test_the_loss_is_that_of_the_models_own_logits(
    text: Tensor, model_type: str, settings: dict[str, Any], wanted: OutputHead
) -> None:
    model = small_model(model_type, **settings)
    modules = list(model.named_modules())
    found = output_head(model)
    assert list(model.named_modules()) == modules
    assert found.followed == wanted.followed
    assert (found.hidden_scale, found.scale) == pytest.approx((wanted.hidden_scale, wanted.scale), rel=1e-5)
    assert found.cap == (None if wanted.cap is None else pytest.approx(wanted.cap, rel=1e-5))
    whole = logits(model, text)
    with torch.no_grad():
        assert distance(project(model, hidden_states(model, text)), whole) < 1e-5
        targets = text.roll(-1, dims=1)
        expected = F.cross_entropy(whole.transpose(1, 2), targets, reduction="none")
        # A few float32 units of logits up to 30.
        torch.testing.assert_close(token_nll(model, text, targets, chunk=7), expected, rtol=0, atol=2e-5)


def test_gradients_pass_through_a_projection_that_is_not_followed(text: Tensor) -> None:
    model = small_model("modernbert-decoder")
    targets = text.roll(-1, dims=1)
    token_nll(model, text, targets, chunk=7).sum().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    whole = model(input_ids=text, use_cache=False).logits
    F.cross_entropy(whole.transpose(1, 2), targets, reduction="sum").backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-4)


def test_hooks_and_weights_are_left_alone() -> None:
    model = small_model("granite", logits_scaling=8.0)
    calls: list[Any] = []
    for module in model.modules():
        module.register_forward_hook(lambda module, *_: calls.append(module))
    for parameter in model.parameters():  # as ZeRO-3 leaves them
        parameter.data = torch.empty(0)
    assert output_head(model) == OutputHead(scale=1 / 8) and not calls
