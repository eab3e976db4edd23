"""What a scaling does in use."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from scaled_rope import RopeScaling, patch_model
from scaled_rope.serving.checks_use import (
    cached_keys_of_dynamic_ntk,
    cached_keys_of_dynamic_scaling,
    longrope_lists_swapped,
    longrope_switches_tables,
    ramp_of_several_axes_in_vllm,
    softmax_scale_from_mscale,
    static_scaling_of_short_prompts,
)
from tests.helpers.facts import UNSCALED, YARN, found, only

DYNAMIC_NTK = RopeScaling("dynamic-ntk", 2.0, 4096)
DYNAMIC_YARN = RopeScaling("yarn", 1.0, 4096, dynamic=True)
LONGROPE = RopeScaling("longrope", 8.0, 4096, params={"short_factor": [1.0] * 4, "long_factor": [2.0] * 4})


def test_what_depends_on_the_length_is_told_apart() -> None:
    checks = (cached_keys_of_dynamic_ntk, cached_keys_of_dynamic_scaling, longrope_switches_tables)
    expected = {
        DYNAMIC_NTK: (["warning dynamic-cache"], [], []),
        DYNAMIC_YARN: ([], ["info dynamic-cache"], []),
        LONGROPE: ([], [], ["info longrope-switch"]),
        YARN: ([], [], []),
        None: ([], [], []),
    }
    for scaling, said in expected.items():
        assert tuple(found(check, scaling=scaling) for check in checks) == said


def test_a_dynamic_scaling_is_named_and_longrope_says_where_it_switches() -> None:
    assert only(cached_keys_of_dynamic_scaling, scaling=DYNAMIC_YARN).text.startswith(f"{DYNAMIC_YARN.label}: ")
    assert "at 4096 tokens" in only(longrope_switches_tables, scaling=LONGROPE).text


@pytest.mark.parametrize("method", ["linear", "ntk", "ntk-by-parts", "part-ntk", "yarn", "ntk-mixed"])
def test_a_static_scaling_changes_short_prompts(method: str) -> None:
    finding = only(static_scaling_of_short_prompts, scaling=RopeScaling(method, 8.0, 4096))
    assert (finding.code, finding.level) == ("static-scaling", "info")
    assert f'"dynamic-{method}"' in finding.remedy


@pytest.mark.parametrize(
    "facts",
    [
        {"scaling": RopeScaling("yarn", 1.0, 4096)},
        {"scaling": DYNAMIC_YARN},
        {"scaling": UNSCALED},
        {"scaling": LONGROPE},
        {"scaling": YARN, "rope": {"finetuned": True}},
        {"scaling": YARN, "model_type": "olmo3"},
        {},
    ],
)
def test_a_scaling_that_was_trained_or_changes_nothing_short(facts: dict[str, Any]) -> None:
    assert found(static_scaling_of_short_prompts, **facts) == []


def test_another_scaling_than_the_trained_one_was_not_trained() -> None:
    for facts in ({"rope": {"finetuned": True}}, {"model_type": "olmo3"}):
        assert found(static_scaling_of_short_prompts, scaling=YARN, spec="yarn:8", **facts) == ["info static-scaling"]


MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}


def test_a_softmax_scale_that_attention_takes_from_mscale_all_dim() -> None:
    scaling = RopeScaling("yarn", 40.0, 4096)
    finding = only(softmax_scale_from_mscale, scaling=scaling, model_type="deepseek_v3", rope=MSCALES)
    assert (finding.code, finding.level) == ("mscale-softmax", "info")
    assert "= 1.874 in their attention" in finding.text  # (0.1·ln 40 + 1)²
    assert "fixed" not in finding.text and "patch_model: it carries that scale to the factor" in finding.remedy


def test_what_is_said_of_the_softmax_scale_is_what_patching_does() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
             "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
             "vocab_size": 61, "num_key_value_heads": 2, "first_k_dense_replace": 1}  # fmt: skip
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, **MSCALES}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, rope_parameters=rope, max_position_embeddings=128))
    attention = model.model.layers[0].self_attn
    for spec, factor in (("yarn:8", (0.1 * math.log(8) + 1) ** 2), ("ntk:8", 1.0)):
        patch_model(model, spec)
        assert attention.scaling == pytest.approx(16**-0.5 * factor)


@pytest.mark.parametrize(
    "facts",
    [
        {"model_type": "llama", "rope": MSCALES},
        {"model_type": "deepseek_v3", "rope": {"mscale": 1.0}},
        {"model_type": "deepseek_v3", "rope": MSCALES | {"mscale": 0}},
        {"model_type": "deepseek_v3", "rope": MSCALES | {"mscale_all_dim": "1"}},  # the reader says what is wrong
        {"model_type": "deepseek_v3", "rope": MSCALES, "scaling": UNSCALED},
        {"model_type": "deepseek_v3", "rope": MSCALES, "scaling": None},
    ],
)
def test_no_softmax_scale(facts: dict[str, Any]) -> None:
    assert found(softmax_scale_from_mscale, **{"scaling": YARN} | facts) == []


@pytest.mark.parametrize(
    ("facts", "codes"),
    [
        ({"model_type": "qwen2_5_vl_text"}, ["info vllm-axes"]),
        ({"model_type": "qwen3_vl_text"}, []),
        ({"model_type": "qwen2_5_vl_text", "rope": {}}, []),
        ({"model_type": "qwen2_5_vl_text", "scaling": UNSCALED}, []),
        ({"model_type": "qwen2_5_vl_text", "spec": "yarn:8"}, []),
    ],
)
def test_the_ramp_of_several_axes_in_vllm(facts: dict[str, Any], codes: list[str]) -> None:
    given = {"scaling": YARN, "rope": {"mrope_section": [16, 24, 24]}} | facts
    assert found(ramp_of_several_axes_in_vllm, **given) == codes


@pytest.mark.parametrize(
    ("short", "long", "codes"),
    [
        ([4.0] * 4, [1.0] * 4, ["warning longrope-swapped"]),
        ([1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0], ["warning longrope-swapped"]),
        ([1.0] * 4, [4.0] * 4, []),
        ([1.0] * 4, [1.0] * 4, []),
        ([1.0, 1.0, 1.0, 2.0], [1.0, 1.5, 2.0, 1.5], []),  # searched for, each by itself
    ],
)
def test_lists_of_longrope_that_are_swapped(short: list[float], long: list[float], codes: list[str]) -> None:
    lists = {"short_factor": short, "long_factor": long}
    assert found(longrope_lists_swapped, scaling=RopeScaling("longrope", 8.0, 4096, params=lists)) == codes
    assert found(longrope_lists_swapped) == []
