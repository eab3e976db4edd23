"""The older dialect beside the newer one."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from scaled_rope.scaling.dialects import FAMILIES, in_both_dialects, older_keys, write_both_dialects
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.record import RopeScaling

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "default": RopeScaling("default", rope_theta=5e4, original_max_position_embeddings=512),
    "linear": RopeScaling("linear", 4.0, 512, rope_theta=5e4),
    "llama3": RopeScaling("llama3", 4.0, 512, rope_theta=5e4, params=LLAMA3),
    "yarn": RopeScaling("yarn", 4.0, 512, rope_theta=5e4),
    "yarn with another ramp": RopeScaling("yarn", 4.0, 512, rope_theta=5e4, beta_fast=64.0, beta_slow=2.0),
}


def text_of(scaling: RopeScaling, model_type: str = "llama") -> dict[str, Any]:
    rope = scaling.to_config(head_dim=16)
    return {"model_type": model_type, "rope_parameters": rope, "max_position_embeddings": 2048}


@pytest.mark.parametrize("name", SCALINGS)
def test_both_are_read_as_one_and_without_a_warning(name: str, tmp_path: Path) -> None:
    scaling = SCALINGS[name]
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=61)
    raw, reason = in_both_dialects(config.to_dict() | text_of(scaling))
    assert reason == "" and raw["rope_theta"] == 5e4 and ("rope_scaling" in raw) == (name != "default")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    rotary = LlamaRotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours, factor = compute_rope(scaling, 16, 2048)
    torch.testing.assert_close(rotary.inv_freq, ours, rtol=1e-6, atol=0)
    assert rotary.attention_scaling == pytest.approx(factor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = RopeScaling.from_config(raw)
    assert compute_rope(read, 16, 2048)[0].tolist() == ours.tolist() and read.method == scaling.method


def test_what_an_older_reader_finds() -> None:
    keys, _ = older_keys(text_of(SCALINGS["yarn"]))
    scaling = keys["rope_scaling"]
    assert keys["rope_theta"] == 5e4 and "rope_theta" not in scaling
    # transformers 4.57 and mlx-lm look for type first, vLLM 0.11 and SGLang 0.5.3 for rope_type.
    assert scaling["type"] == scaling["rope_type"] == "yarn"
    assert (scaling["factor"], scaling["original_max_position_embeddings"]) == (4.0, 512)
    assert scaling["attention_factor"] == pytest.approx(1 + 0.1 * math.log(4))
    partial = text_of(RopeScaling("linear", 4.0, 512, partial_rotary_factor=0.5), "phi")
    assert older_keys(partial)[0]["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"truncate": False}, "mlx-lm round the ends of the ramp"),
        ({"attention_factor": 1.0}, "mlx-lm read no attention_factor"),
        (
            {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
            "mlx-lm takes the long list at every length",
        ),
        ({"rope_type": "dynamic"}, "no such rope_type 'dynamic'"),
        ({"rope_type": "proportional"}, "no such rope_type 'proportional'"),
        ({"rope_type": "scaled-rope"}, "no program but this package knows the type"),
        ({"mrope_section": [2, 3, 3]}, "attention reads keys of it"),
    ],
)
def test_what_a_reader_would_take_for_something_else_is_not_written(change: dict[str, Any], reason: str) -> None:
    text = text_of(SCALINGS["yarn"])
    text["rope_parameters"] |= change
    assert older_keys(text)[0] == {} and reason in older_keys(text)[1]
    assert in_both_dialects(text)[0] == text


def test_families_and_forms_that_were_not_tried_are_left_alone() -> None:
    assert "were not tried with gpt_neox models" in older_keys(text_of(SCALINGS["yarn"], "gpt_neox"))[1]
    assert "llama" in FAMILIES and "gpt_neox" not in FAMILIES
    nested = {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    assert older_keys(nested) == ({}, "it has no form per layer type")
    assert older_keys({"model_type": "llama"}) == ({}, "")
    old = {"model_type": "llama", "rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert in_both_dialects(old) == (old, "")


def test_the_text_part_of_a_composite_config_gets_them(tmp_path: Path) -> None:
    whole = {"model_type": "llava", "text_config": text_of(SCALINGS["linear"])}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert write_both_dialects(tmp_path) == ""
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["rope_scaling"]["factor"] == 4.0 and set(written) == set(whole)
