"""Scalings per layer type, and layers that rotate nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from scaled_rope import RopeScaling, patch_model, unpatch_model
from scaled_rope.patching.families import adapter_of
from scaled_rope.patching.rotary import ScaledRotaryEmbedding
from scaled_rope.scaling.hf_config import head_dim_of
from tests.helpers.families import (
    ALL,
    CHANGED,
    NESTED,
    PLANS,
    SAME,
    SHARED,
    TYPED,
    assert_same_gradients,
    attention_tables,
    distance,
    force_tables,
    logits,
    reference_of,
    width,
)
from tests.helpers.models import LAYER_TYPES, Make


def tables_of(scaling: RopeScaling, model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of `ScaledRotaryEmbedding` for a text, in the layout of an unpatched model's family."""
    adapter = adapter_of(model.config, model.base_model.rotary_emb)
    rotary = ScaledRotaryEmbedding(scaling, head_dim_of(model.config), layout=adapter.layout)
    return rotary(torch.zeros(1), torch.arange(tokens.shape[1])[None])


def assert_tables(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for one, other in zip(got, wanted, strict=True):
        # The same operations; at most the order of a broadcast multiplication could differ.
        torch.testing.assert_close(one, other.expand_as(one), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TYPED)
def test_layer_types_are_scaled_apart(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model, untouched = tiny_model(family), tiny_model(family)
    before, first = logits(model, tokens), attention_tables(model, tokens)
    own = {name: RopeScaling.from_config(model.config, name if family in NESTED else None) for name in set(LAYER_TYPES)}
    plans: list[dict[str, str | None]] = [
        {"full_attention": "yarn:4", "sliding_attention": None},
        {"full_attention": "yarn:4", "sliding_attention": "linear:2"},
        {"sliding_attention": "linear:2"},
    ]
    for plan in plans:
        report = patch_model(model, plan)
        scalings = {
            name: RopeScaling.from_spec(plan.get(name) or "default", own[name]) for name in ("full_attention", *plan)
        }
        assert report.plan.layers == {name: scalings.get(name, own[name]) for name in LAYER_TYPES}
        assert report.scaling == scalings["full_attention"]
        assert report.native == (family in NESTED)
        tables = attention_tables(model, tokens)
        exact = tiny_model(family)
        layout = adapter_of(exact.config, exact.base_model.rotary_emb).layout
        forced = []
        for index, kind in enumerate(LAYER_TYPES):
            wanted = report.plan.layers[kind]
            assert_tables(tables[index], tables_of(wanted, untouched, tokens))
            unchanged = distance(tables[index][0], first[index][0]) < 1e-4  # angles to some float32 units
            assert unchanged == (plan.get(kind) is None)
            rotary = reference_of(wanted, width(untouched), layout)
            forced.append(rotary(torch.zeros(1), torch.arange(48).expand(2, -1)))
        force_tables(exact, forced)
        assert distance(logits(exact, tokens), logits(model, tokens)) < SAME
        patch_model(model, "default") if family in SHARED else patch_model(model, {})
        assert distance(logits(model, tokens), before) < SAME
    patch_model(model, plans[0])
    twin = copy.deepcopy(model)
    patched = logits(model, tokens)
    unpatch_model(model)
    assert torch.equal(logits(model, tokens), before) and not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(twin, tokens), patched)
    unpatch_model(twin)
    assert torch.equal(logits(twin, tokens), before) and not any(m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("family", NESTED)
def test_one_scaling_leaves_sliding_layers_alone_where_types_are_told_apart(
    tiny_model: Make, tokens: Tensor, family: str
) -> None:
    model, explicit = tiny_model(family), tiny_model(family)
    first = attention_tables(model, tokens)
    report = patch_model(model, "yarn:4")
    patch_model(explicit, {"full_attention": "yarn:4", "sliding_attention": None})
    assert torch.equal(logits(model, tokens), logits(explicit, tokens)) and model.config == explicit.config
    sliding, full = attention_tables(model, tokens)
    assert distance(sliding[0], first[0][0]) < 1e-4 and distance(full[0], first[1][0]) > 0.1
    assert report.plan.layers["sliding_attention"].method == "default" and report.scaling.method == "yarn"


@pytest.mark.parametrize("family", ALL)
def test_dropped_layers_rotate_nothing(tiny_model: Make, tokens: Tensor, family: str) -> None:
    model, exact = tiny_model(family), tiny_model(family)
    before, first = logits(model, tokens), attention_tables(model, tokens)
    report = patch_model(model, "yarn:4", drop_layers=[0])
    assert report.plan.drop_layers == (0,) and not report.native
    (cos, sin), second = attention_tables(model, tokens)
    assert bool((cos == 1).all()) and bool((sin == 0).all())
    assert cos.shape == first[0][0].shape and cos.dtype == first[0][0].dtype
    assert_tables(second, tables_of(report.scaling, exact, tokens))
    adapter = adapter_of(exact.config, exact.base_model.rotary_emb)
    table = reference_of(report.scaling, width(exact), adapter.layout)(torch.zeros(1), torch.arange(48).expand(2, -1))
    force_tables(exact, [(torch.ones_like(table[0]), torch.zeros_like(table[1])), table])
    assert distance(logits(exact, tokens), logits(model, tokens)) < SAME
    assert distance(logits(model, tokens), before) > CHANGED


@pytest.mark.parametrize(("family", "scaling", "dropped"), PLANS)
def test_plans_under_gradient_checkpointing(
    tiny_model: Make, tokens: Tensor, family: str, scaling: Any, dropped: list[int]
) -> None:
    def make() -> PreTrainedModel:
        model = tiny_model(family)
        patch_model(model, scaling, drop_layers=dropped)
        return model

    assert_same_gradients(make, tokens)
