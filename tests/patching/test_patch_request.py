"""Requests to `patch_model`: those that are refused, and those that are remarked on."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from scaled_rope import ConfigError, RopeScaling
from scaled_rope.patching.loading import resolve_plan
from scaled_rope.patching.patch import patch_model
from scaled_rope.scaling.record import LayerPlan, RopeSettings
from tests.helpers.caches import refused
from tests.helpers.families import logits
from tests.helpers.models import Make


def test_layers_share_their_steps(tiny_model: Make) -> None:
    model = tiny_model("qwen3")
    layers = {"full_attention": "dynamic-yarn,dynamic_step=2", "sliding_attention": "dynamic-yarn"}
    refused(lambda: patch_model(model, layers), "dynamic_step", "share")


def test_layers_that_do_not_exist_are_refused(tiny_model: Make, tokens: Tensor) -> None:
    model = tiny_model()
    before = logits(model, tokens)
    for wrong in ([2], [-1], [0, 9]):
        with pytest.raises(ConfigError, match="drop_layers=.*0 to 1"):
            patch_model(model, "yarn:4", drop_layers=wrong)
    for none, shown in (("1", "'1'"), (["1"], "'1'"), (1, "1"), ([0.5], "0.5"), ([True], "True"), (None, "None")):
        with pytest.raises(ConfigError, match=rf"drop_layers={shown}: must be .* ind.*, 0 to 1"):
            patch_model(model, "yarn:4", drop_layers=none)  # type: ignore[arg-type]
        if none is not None:
            with pytest.raises(ConfigError, match=rf"drop_layers={shown}: must be .* ind.*, 0 to 1"):
                resolve_plan(RopeSettings(model.config), drop_layers=none)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no layer types"):
        patch_model(model, {"full_attention": "yarn:4"})
    with pytest.raises(ConfigError, match="unknown layer type 'global'"):
        patch_model(tiny_model("gemma3_text"), {"global": "yarn:4"})
    assert torch.equal(logits(model, tokens), before)


def test_more_groups_than_pairs_are_refused(tiny_model: Make) -> None:
    model = tiny_model()
    half = model.config.hidden_size // model.config.num_attention_heads // 2
    patch_model(model, f"dpe,groups={'+'.join(['4'] * half)},window=8")
    with pytest.raises(ConfigError, match=f"groups holds {half + 1} numbers: must be at most {half}, as many as pairs"):
        patch_model(model, f"dpe,groups={'+'.join(['4'] * (half + 1))},window=8")


def test_layer_types_without_rotary_embedding_cannot_be_scaled(tiny_model: Make, tokens: Tensor) -> None:
    model, whole = tiny_model("cohere2"), tiny_model("cohere2")
    with pytest.raises(ConfigError, match="layer type 'full_attention': .*no rotary embedding"):
        patch_model(model, {"full_attention": "yarn:4"})
    report = patch_model(model, {"sliding_attention": "yarn:4", "full_attention": None})
    patch_model(whole, "yarn:4")
    assert torch.equal(logits(model, tokens), logits(whole, tokens))
    assert report.scaling.method == "yarn" and report.native and report.plan == LayerPlan()


def test_notes_tell_what_may_not_be_meant(tiny_model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert patch_model(tiny_model(), "yarn:4").notes == ()
        mistral = patch_model(tiny_model("mistral", sliding_window=64), "yarn:4")
        assert mistral.notes == ("sliding_window=64 is shorter than the context of 128 tokens",)
    with pytest.warns(UserWarning, match="rope_theta=10000 differs from the model's own 50000"):
        report = patch_model(
            tiny_model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}),
            RopeScaling("yarn", 4.0, 16),
        )
    assert report.before == RopeScaling("linear", 2.0, 32, 50000.0)
    assert len(report.notes) == 3 and report.notes[-1].endswith("linear x2")
