"""A scaling that cannot act on a model is told in the report's notes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.small_models import MODEL_TYPES, small_model
from scaled_rope import ConfigError, patch_model
from tests.helpers.families import logits
from tests.helpers.models import Make


@pytest.mark.parametrize(
    ("spec", "more", "wanted"),
    [
        (
            "yarn:4",
            {"drop_layers": [0, 1]},
            "acts in no layer: drop_layers leaves none .*attention_factor=1.1386 m",
        ),
        ("linear:4", {"drop_layers": [0, 1]}, "linear x4 acts in no layer: drop_layers leaves none"),
        ("yarn:1", {}, "yarn x1 computes what the model computed before"),
        ("default", {}, "unscaled computes what the model computed before"),
        (
            "dynamic-yarn:1,original_max_position_embeddings=4096",
            {},
            "beyond .*=4096 tokens only, more than the 32",
        ),
    ],
)
def test_what_cannot_act_is_told(tiny_model: Make, spec: str, more: dict[str, Any], wanted: str) -> None:
    model = tiny_model()
    tokens = torch.arange(1, 31)[None]  # no longer than L
    before = logits(model, tokens)
    notes = patch_model(model, spec, **more).notes
    assert len([note for note in notes if re.search(wanted, note)]) == 1
    if "drop_layers" not in more:
        torch.testing.assert_close(logits(model, tokens), before, rtol=0, atol=1e-5)  # and it is true


@pytest.mark.parametrize("spec", ["yarn:4", "linear:4", "dynamic-yarn", "ntk:4"])
def test_what_acts_is_not_told_to_be_idle(tiny_model: Make, spec: str) -> None:
    notes = patch_model(tiny_model(), spec, drop_layers=[0]).notes
    assert not any("acts" in note or "computed before" in note or "no effect" in note for note in notes)


@pytest.mark.skipif("molmo2" not in MODEL_TYPES, reason="a release of transformers without this family")
def test_layers_that_a_family_never_scales() -> None:
    some = small_model("molmo2", rope_scaling_layers=[0, 2])
    assert patch_model(some, "yarn:4").modules == ("model.language_model.rotary_emb",)
    with pytest.raises(ConfigError, match="all its layers take their angles from rotary_emb_unscaled"):
        patch_model(small_model("molmo2", rope_scaling_layers=[]), "yarn:4")


@pytest.mark.parametrize(
    ("family", "more", "spec", "window"),
    [
        ("cohere2", {}, "yarn:4", 16),
        ("exaone4", {}, "dynamic-yarn", 16),
        ("afmoe", {}, "ntk:4", 16),
        ("kolibri1", {}, "yarn:4", 16),
        ("llama4_text", {"attention_chunk_size": 32}, "yarn:4", 32),
        ("llama4_text", {"attention_chunk_size": 128}, "yarn:4", 128),
        ("llama4_text", {"attention_chunk_size": 256}, "yarn:4", None),  # as long as the text is to be
        ("gemma3_text", {}, {"sliding_attention": "yarn:4"}, 16),
        ("gemma3_text", {}, "yarn:4", None),
        ("gpt_oss", {}, "yarn:4", None),  # its full attention rotates as well
        ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 4}, "yarn:4", None),
        ("qwen3", {}, "yarn:4", None),
    ],
)
def test_a_scaling_that_acts_within_windows_alone_is_told(
    family: str, more: dict[str, Any], spec: Any, window: int | None
) -> None:
    if family not in MODEL_TYPES:
        pytest.skip("a release of transformers without this family")
    notes = patch_model(small_model(family, **more), spec, kernel="none").notes
    found = [note for note in notes if "acts only in layers" in note]
    assert len(found) == (window is not None)
    assert not found or re.search(rf" acts only in layers that see {window} tokens; L = 64$", found[0])
