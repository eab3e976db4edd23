"""The doctor: what it reads from configs of published models, and which traps it finds in them and in loaded models."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, FalconConfig, FalconForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from scaled_rope import METHODS, ConfigError, RopeScaling, compute_rope, patch_model
from scaled_rope.cli import main
from scaled_rope.serving.inspect_config import inspect
from scaled_rope.serving.inspect_model import check_model
from scaled_rope.serving.scaling_plots import regimes

ROOT = Path(__file__).resolve().parents[1]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
MISTRAL = LLAMA | {
    "model_type": "mistral",
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
}
REMOTE = {"AutoModelForCausalLM": "modeling_llama_together_yarn.LlamaForCausalLM"}
LIST = [1.0 + d / 8 for d in range(48)]


def yarn(factor: float, original: int | None, **more: Any) -> dict[str, Any]:
    length = {} if original is None else {"original_max_position_embeddings": original}
    return {"type": "yarn", "factor": factor, **length, **more}


def released(factor: float, base: dict[str, Any], original: int, **more: Any) -> dict[str, Any]:
    """After the configs that the YaRN authors published."""
    return base | {"auto_map": REMOTE, "rope_scaling": yarn(factor, original, finetuned=True)} | more


PHI3 = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "rope_scaling": {"type": "longrope", "short_factor": LIST, "long_factor": [2 * x for x in LIST]},
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "max_position_embeddings": 32768,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "rope_scaling": yarn(4.0, 32768),
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "qk_rope_head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": yarn(40, 4096, mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1),
}
OLMO3 = {
    "model_type": "olmo3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "max_position_embeddings": 65536,
    "rope_theta": 500000,
    "sliding_window": 4096,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "num_attention_heads": 64,
    "head_dim": 64,
    "num_hidden_layers": 24,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "sliding_window": 128,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
LLAMA3 = LLAMA | {
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "num_hidden_layers": 12,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 1024,
    },
}
COHERE2 = {
    "model_type": "cohere2",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 8,
    "max_position_embeddings": 132096,
    "rope_theta": 50000,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}
SMOLLM3 = {
    "model_type": "smollm3",
    "hidden_size": 2048,
    "num_attention_heads": 16,
    "num_hidden_layers": 8,
    "max_position_embeddings": 65536,
    "rope_theta": 5000000.0,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 6,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.25,
}
MINISTRAL3 = {
    "model_type": "ministral3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 262144,
    "rope_parameters": yarn(16.0, 16384, mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0)
    | {"rope_type": "yarn", "rope_theta": 1000000.0, "llama_4_scaling_beta": 0.1},
}
LLAMA4 = {
    "model_type": "llama4_text",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 10485760,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    },
}
EXAONE4 = {
    "model_type": "exaone4",
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "head_dim": 128,
    "num_hidden_layers": 8,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "sliding_window": 4096,
    "sliding_window_pattern": "LLLG",
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
    "rope_scaling": LLAMA3["rope_scaling"] | {"factor": 16.0},
}
FALCON = {
    "model_type": "falcon",
    "hidden_size": 4544,
    "num_attention_heads": 71,
    "alibi": False,
    "max_position_embeddings": 2048,
}

# What a published model's config must and must not set off: name -> (config, spec of the scaling, codes).
PUBLISHED: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "Llama-2": (LLAMA, "unscaled", set()),
    "CodeLlama": (LLAMA | {"max_position_embeddings": 16384, "rope_theta": 1e6}, "unscaled", set()),
    "Llama-3.1": (LLAMA3, "llama3 x8", set()),
    "Yarn-Llama-2-7b-64k": (
        released(16.0, LLAMA, 4096, max_position_embeddings=65536),
        "yarn x16",
        {"finetuned", "remote-code"},
    ),
    "Yarn-Llama-2-7b-128k": (
        released(32.0, LLAMA, 4096, max_position_embeddings=131072),
        "yarn x32",
        {"finetuned", "remote-code"},
    ),
    "Yarn-Mistral-7b-64k": (
        released(8.0, MISTRAL, 8192, sliding_window=65536),
        "yarn x8 (beta_fast=128, beta_slow=2, mscale=0.7)",
        {"finetuned", "remote-code", "mistral-constants", "length-mismatch"},
    ),
    "Yarn-Mistral-7b-128k": (
        released(16.0, MISTRAL, 8192, sliding_window=131072),
        "yarn x16 (beta_fast=128, beta_slow=2, mscale=0.7)",
        {"finetuned", "remote-code", "mistral-constants", "length-mismatch"},
    ),
    "Phi-3-mini-128k": (PHI3, "longrope x32", {"longrope-switch"}),
    "Qwen2.5 with the YaRN of its card": (QWEN, "yarn x4", {"undeclared-length", "static-scaling"}),
    "DeepSeek-V3": (DEEPSEEK, "yarn x40 (attention_factor=1, beta_fast=32, beta_slow=1)", {"mscale-softmax"}),
    "Gemma 3": (GEMMA3, "linear x8", {"family-theta", "unknown-original"}),
    "OLMo 3": (OLMO3, "yarn x8", set()),
    "GPT-OSS": (GPT_OSS, "yarn x32", set()),
    "SmolLM3": (SMOLLM3, "unscaled", {"layers-without-rope"}),
    "Cohere2": (COHERE2, "unscaled", {"layers-without-rope"}),
    "Pythia": (PYTHIA, "unscaled", set()),
    "Ministral-3": (MINISTRAL3, "yarn x16 (attention_factor=1, beta_fast=32, beta_slow=1)", {"attention-key"}),
    "Llama-4-Scout": (LLAMA4, "llama3 x16 (high_freq_factor=1)", set()),
    "EXAONE-4.0-32B": (EXAONE4, "llama3 x16", {"layers-without-rope"}),
    "Falcon": (FALCON, "unscaled", {"family-theta"}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_set_off_what_they_should_and_nothing_else(name: str):
    config, label, codes = PUBLISHED[name]
    report = inspect(config)
    assert report.scaling is not None and report.scaling.label.startswith(label)
    assert set(report.codes) == codes, report.text()
    assert report.exit_code == 0
    assert len(report.dimensions) == report.head_dim * report.scaling.partial_rotary_factor / 2


def scaled(base: dict[str, Any], **rope: Any) -> dict[str, Any]:
    return base | {"rope_scaling": rope}


NEW = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
STATIC = "static-scaling"
WIDE = {"max_position_embeddings": 32768}

# A trap -> (config, the code of the trap, its level, codes that come along).
TRAPS: dict[str, tuple[dict[str, Any], str, str, set[str]]] = {
    "factor times L is below max_position_embeddings": (
        scaled(LLAMA | {"max_position_embeddings": 65536}, **yarn(8.0, 4096)),
        "length-mismatch",
        "warning",
        {STATIC},
    ),
    "factor times L is above max_position_embeddings": (
        scaled(LLAMA | {"max_position_embeddings": 16384}, **yarn(8.0, 4096)),
        "length-mismatch",
        "warning",
        {STATIC},
    ),
    "factor counts twice: L missing, max_position_embeddings extended": (
        scaled(LLAMA | {"max_position_embeddings": 65536}, **yarn(16.0, None)),
        "factor-twice",
        "warning",
        {STATIC},
    ),
    "factor counts twice: L is max_position_embeddings": (
        scaled(LLAMA | WIDE, **yarn(8.0, 32768)),
        "undeclared-length",
        "warning",
        {STATIC},
    ),
    "L missing": (scaled(LLAMA, **yarn(8.0, None)), "no-original", "warning", {STATIC}),
    "L missing, position interpolation": (
        scaled(LLAMA, type="linear", factor=8.0),
        "unknown-original",
        "info",
        {STATIC},
    ),
    "theta missing, known family": (scaled(NEW | WIDE, **yarn(8.0, 4096)), "family-theta", "info", {STATIC}),
    "theta missing, unknown family": (
        scaled(NEW | WIDE | {"model_type": "llamoid"}, **yarn(8.0, 4096)),
        "no-theta",
        "warning",
        {STATIC, "unknown-family"},
    ),
    "theta dropped: rope_scaling replaces the dictionary that held it": (
        NEW | WIDE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": yarn(8.0, 4096)},
        "theta-dropped",
        "error",
        {STATIC, "both-dialects", "family-theta"},
    ),
    "theta twice": (
        LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        "two-values",
        "warning",
        set(),
    ),
    "both dialects, which disagree": (
        LLAMA | WIDE | {"rope_scaling": yarn(8.0, 4096), "rope_parameters": yarn(4.0, 4096)},
        "both-dialects",
        "warning",
        {STATIC},
    ),
    "both dialects, which agree": (
        LLAMA | WIDE | {"rope_scaling": yarn(8.0, 4096), "rope_parameters": yarn(8.0, 4096) | {"rope_theta": 1e4}},
        "both-dialects",
        "info",
        {STATIC},
    ),
    "type and rope_type disagree": (
        scaled(LLAMA, type="yarn", rope_type="linear", factor=8.0),
        "two-values",
        "warning",
        {STATIC, "unknown-original"},
    ),
    "a Mistral without the constants": (
        scaled(MISTRAL | {"sliding_window": None, "max_position_embeddings": 65536}, **yarn(8.0, 8192)),
        "mistral-llama-constants",
        "warning",
        {STATIC},
    ),
    "mscale alone": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, mscale=0.7)), "lone-mscale", "warning", {STATIC}),
    "mscale_all_dim alone, where the model's code reads it": (
        DEEPSEEK | {"rope_scaling": yarn(40, 4096, mscale_all_dim=1.0)},
        "mscale-twice",
        "warning",
        set(),
    ),
    "vLLM's attn_factor": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, attn_factor=1.2)), "foreign-key", "error", {STATIC}),
    "vLLM's extrapolation_factor, at its neutral value": (
        scaled(LLAMA | WIDE, **yarn(8.0, 4096, extrapolation_factor=1)),
        "foreign-key",
        "info",
        {STATIC},
    ),
    "a misspelt key": (scaled(LLAMA | WIDE, **yarn(8.0, 4096, beta_fats=64)), "unknown-key", "error", {STATIC}),
    "a key of another rope_type": (
        scaled(LLAMA, type="linear", factor=8.0, beta_fast=64),
        "unknown-key",
        "error",
        {STATIC, "unknown-original"},
    ),
    "rope_scalling": (LLAMA | {"rope_scalling": yarn(8.0, 4096)}, "misspelt-key", "error", set()),
    "rope_parameter": (LLAMA | {"rope_parameter": yarn(8.0, 4096)}, "misspelt-key", "error", set()),
    "dynamic": (scaled(LLAMA, type="dynamic", factor=2.0), "dynamic-cache", "warning", set()),
    "dynamic with an L of its own": (
        scaled(LLAMA, type="dynamic", factor=2.0, original_max_position_embeddings=2048),
        "two-values",
        "warning",
        {"dynamic-cache"},
    ),
    "dynamic-yarn": (
        scaled(LLAMA, type="dynamic-yarn", factor=1.0, original_max_position_embeddings=4096),
        "dynamic-cache",
        "info",
        {"not-native"},
    ),
    "dynamic-yarn with a factor that was not trained": (
        scaled(LLAMA, type="dynamic-yarn", factor=8.0, original_max_position_embeddings=4096),
        "dynamic-factor",
        "warning",
        {"not-native", "dynamic-cache"},
    ),
    "our own rope_type": (
        NEW | WIDE | {"rope_parameters": RopeScaling("yarn", 8.0, 4096, ramp="rotations").to_config()},
        "not-native",
        "info",
        {STATIC},
    ),
    "Phi-3 with yarn": (PHI3 | {"rope_scaling": yarn(32.0, 4096)}, "phi3-rewritten", "error", {STATIC}),
    "Phi-3 with linear": (
        PHI3 | {"rope_scaling": {"type": "linear", "factor": 32.0}},
        "phi3-refused",
        "error",
        {STATIC},
    ),
    "OLMo 3, flat": (
        {key: value for key, value in OLMO3.items() if key != "rope_scaling"} | {"rope_parameters": yarn(8.0, 8192)},
        "flat-parameters",
        "error",
        set(),
    ),
    "Gemma 3, flat": (
        GEMMA3["text_config"]
        | {"rope_scaling": None, "rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
        "flat-parameters",
        "error",
        {"family-theta"},
    ),
    "truncate inside a layer type": (
        {key: value for key, value in OLMO3.items() if key != "rope_scaling"}
        | {
            "rope_parameters": {
                "full_attention": yarn(8.0, 8192, truncate=False),
                "sliding_attention": {"rope_type": "default"},
            }
        },
        "nested-truncate",
        "warning",
        set(),
    ),
    "Falcon with ALiBi": (FALCON | {"alibi": True}, "alibi", "info", {"family-theta"}),
    "Falcon with ALiBi and a scaling": (
        scaled(FALCON | {"alibi": True, "rope_theta": 1e4, "max_position_embeddings": 16384}, **yarn(8.0, 2048)),
        "alibi",
        "error",
        {STATIC},
    ),
    "Mistral's window is shorter than L'": (
        scaled(MISTRAL | {"max_position_embeddings": 65536}, **yarn(8.0, 8192, beta_fast=32)),
        "sliding-window",
        "warning",
        {STATIC},
    ),
    "Mistral's window is shorter than its context": (MISTRAL, "sliding-window", "info", set()),
    "Cohere 2 scaled, where only near layers rotate": (
        scaled(COHERE2 | {"max_position_embeddings": 32768}, **yarn(4.0, 8192)),
        "layers-without-rope",
        "warning",
        {STATIC},
    ),
    "a model without RoPE": ({"model_type": "gpt2", "n_positions": 1024}, "no-rope", "warning", set()),
    "a scaling for a model without RoPE": (
        {"model_type": "gpt2", "n_positions": 1024, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "no-rope",
        "error",
        {STATIC, "no-theta", "unknown-original"},
    ),
    "llama_4_scaling_beta in a family that does not read it": (
        scaled(LLAMA | WIDE, **yarn(8.0, 4096, llama_4_scaling_beta=0.1)),
        "unknown-key",
        "error",
        {STATIC},
    ),
    "an unknown rope_type": (scaled(LLAMA, type="yarm", factor=8.0), "unknown-type", "error", set()),
    "no factor": (
        scaled(LLAMA, type="yarn", original_max_position_embeddings=4096),
        "no-factor",
        "error",
        set(),
    ),
    "a factor below 1": (scaled(LLAMA, **yarn(0.5, 4096)), "bad-value", "error", set()),
    "a factor as text": (scaled(LLAMA, **yarn("8", 4096)), "bad-value", "error", set()),
    "no dictionary": (LLAMA | {"rope_scaling": "yarn"}, "bad-value", "error", set()),
    "betas that cross": (scaled(LLAMA, **yarn(8.0, 4096, beta_slow=64)), "bad-value", "error", set()),
    "longrope with lists of another length": (
        LLAMA
        | WIDE
        | {"rope_scaling": PHI3["rope_scaling"] | {"factor": 8.0, "original_max_position_embeddings": 4096}},
        "bad-value",
        "error",
        {"longrope-switch"},
    ),
    "multimodal sections": (
        scaled(LLAMA, type="default", mrope_section=[16, 24, 24]),
        "bad-value",
        "error",
        set(),
    ),
    "code in the checkpoint of an unknown family": (
        LLAMA | {"model_type": "llamoid", "auto_map": REMOTE},
        "remote-code",
        "warning",
        set(),
    ),
    "an odd head": (LLAMA | {"head_dim": 63}, "bad-value", "error", set()),
}


@pytest.mark.parametrize("name", TRAPS)
def test_each_trap_is_found_and_nothing_else(name: str):
    config, code, level, others = TRAPS[name]
    before = copy.deepcopy(config)
    report = inspect(config)
    assert config == before, "inspect must not change what it is given"
    assert set(report.codes) == {code, *others}, report.text()
    found = [finding for finding in report.findings if finding.code == code]
    assert {finding.level for finding in found} == {level}
    assert report.exit_code == (1 if any(finding.level == "error" for finding in report.findings) else 0)
    for finding in report.findings:
        assert "\n" not in finding.text and finding.text.endswith((".", "?")), finding


def test_a_record_that_the_config_has_left_behind():
    record = RopeScaling("ntk", 8.0, 4096).to_dict()
    config = LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "scaled_rope": record}
    assert inspect(config).codes == ["stale-record"]


def test_what_is_said_about_transformers_is_what_transformers_does():
    def built(name: str) -> dict[str, Any]:
        config = copy.deepcopy(TRAPS[name][0])
        return CONFIG_MAPPING[config["model_type"]].from_dict(config).get_text_config().rope_parameters

    assert built("theta dropped: rope_scaling replaces the dictionary that held it")["rope_theta"] == 10000.0
    assert built("OLMo 3, flat")["full_attention"]["rope_type"] == "default"
    assert (
        built("factor counts twice: L missing, max_position_embeddings extended")["original_max_position_embeddings"]
        == 65536
    )
    assert built("both dialects, which disagree")["factor"] == 8.0
    assert built("type and rope_type disagree")["rope_type"] == "linear"
    for name in ("Phi-3 with yarn", "Phi-3 with linear"):
        with pytest.raises(Exception, match="short_factor|longrope"):
            built(name)


def test_another_computation_in_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch):
    config = scaled(LLAMA | WIDE, **yarn(8.0, 4096))
    own = compute_rope(RopeScaling("yarn", 8.0, 4096, truncate=False), 128)
    monkeypatch.setitem(ROPE_INIT_FUNCTIONS, "yarn", lambda *args, **kwargs: own)
    report = inspect(config)
    assert report.codes == ["computes-otherwise", STATIC] and report.exit_code == 1


def test_the_table_holds_the_numbers_in_effect():
    report = inspect(PUBLISHED["Yarn-Llama-2-7b-64k"][0])
    inv_freq, factor = compute_rope(RopeScaling("yarn", 16.0, 4096), 128)
    assert [dimension.scaled for dimension in report.dimensions] == inv_freq.double().tolist()
    for dimension in report.dimensions:
        plain = 10000.0 ** (-2 * dimension.index / 128)
        # Tables are float32.
        assert dimension.theta == pytest.approx(plain, rel=1e-6)
        assert dimension.wavelength == pytest.approx(2 * math.pi / plain, rel=1e-6)
        assert dimension.rotations == pytest.approx(4096 * plain / (2 * math.pi), rel=1e-6)
        expected = {"kept": 1.0, "interpolated": 16.0}.get(dimension.regime)
        assert dimension.divisor == pytest.approx(expected, rel=1e-5) if expected else 1 < dimension.divisor < 16
    numbers = {number.name: number.value for number in report.numbers}
    assert numbers["attention factor √(1/t)"] == pytest.approx(0.1 * math.log(16) + 1) == pytest.approx(factor)
    assert (numbers["head_dim"], numbers["beta_fast"], numbers["finetuned"]) == (128, 32.0, True)
    assert report.lengths == {
        "original": 4096,
        "extended": 65536,
        "max_position_embeddings": 65536,
        "sliding_window": None,
        "shown": None,
    }
    assert report.native == "yarn"


def test_lengths_that_are_no_product_of_the_factor():
    assert inspect(LLAMA3).lengths["extended"] is None  # there the factor is no ratio of lengths
    assert inspect(GEMMA3).lengths["extended"] is None  # which of its lengths is L is not said


def test_partial_rotation_and_rotated_parts():
    pythia, deepseek = inspect(PYTHIA), inspect(DEEPSEEK)
    assert {number.name: number.value for number in pythia.numbers}["rotated dimensions"] == 16
    assert deepseek.head_dim == 64  # not hidden_size / heads


def test_layer_types_have_their_own_scalings():
    report = inspect(OLMO3)
    assert {name: one.label for name, one in report.layers.items()} == {
        "sliding_attention": "unscaled",
        "full_attention": "yarn x8 (beta_fast=32, beta_slow=1)",
    }
    assert inspect(OLMO3, layer_type="sliding_attention").scaling.label == "unscaled"
    with pytest.raises(ConfigError, match="layer_type='full': must be one of"):
        inspect(OLMO3, layer_type="full")
    with pytest.raises(ConfigError, match="tells no layer types apart"):
        inspect(LLAMA, layer_type="full_attention")
    assert inspect(SMOLLM3).without_rope == (3, 7)
    assert inspect(COHERE2).without_rope == (3, 7)


def test_layers_that_a_patch_told_apart(tiny_model):
    model = tiny_model(layer_types=["full_attention", "sliding_attention"])
    patch_model(model, {"full_attention": "yarn:4"}, drop_layers=[1])
    report = inspect(model.config.to_dict())
    assert report.without_rope == (1,) and set(report.codes) == {"layers-without-rope", "not-native", STATIC}
    assert {name: one.method for name, one in report.layers.items()} == {
        "full_attention": "yarn",
        "sliding_attention": "default",
    }
    assert inspect(model.config).layers == report.layers


def test_another_scaling_than_the_models_own():
    report = inspect(LLAMA, scaling="dynamic-yarn")
    assert report.codes == ["dynamic-cache"] and report.lengths["shown"] == 8192
    longer = inspect(LLAMA, scaling="dynamic-yarn", length=16384)
    assert [d.scaled for d in longer.dimensions] == compute_rope(report.scaling, 128, 16384)[0].double().tolist()
    assert report.native is None
    with pytest.raises(ConfigError, match="unknown method 'yarm'"):
        inspect(LLAMA, scaling="yarm:8")


def test_regimes():
    assert regimes([1.0, 0.9, 2.0, 8.0, math.inf], 8.0) == ["kept", "raised", "blended", "interpolated", "stopped"]
    assert regimes([1.0, 3.0], 1.0) == ["kept", "changed"]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 0.5, 1, 3, 1e9, 10**30, float("nan"), float("inf"), "8", "", [], [1], {}, {"a": 1}]),
    st.sampled_from(["yarn", "linear", "dynamic", "llama3", "longrope", "scaled-rope", "dynamic-yarn", "proportional"]),
)
KEYS = ["rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "mscale", "attention_factor"]
KEYS += [
    "finetuned",
    "rope_theta",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "truncate",
    "full_attention",
]
TOP = [
    "max_position_embeddings",
    "rope_theta",
    "head_dim",
    "hidden_size",
    "num_attention_heads",
    "layer_types",
    "alibi",
]
TOP += ["sliding_window", "model_type", "rope_scaling", "rope_parameters", "auto_map", "scaled_rope", "text_config"]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from([LLAMA, MISTRAL, PHI3, OLMO3, GEMMA3, DEEPSEEK, COHERE2, PYTHIA]),
    st.dictionaries(st.sampled_from(TOP), VALUES, max_size=2),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    st.sampled_from(["rope_scaling", "rope_parameters", None]),
)
def test_no_config_ends_in_a_traceback(base: dict[str, Any], top: dict[str, Any], rope: dict[str, Any], place: str):
    config = base | top | ({place: rope} if place else {})
    try:
        report = inspect(config)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        json.dumps(report.to_dict())
        report.text(full=True)


# Loaded models --------------------------------------------------------------------------------------------------------


def codes(model: torch.nn.Module) -> list[str]:
    return sorted(finding.code for finding in check_model(model))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
EDITED = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def test_a_model_that_computes_what_its_config_says(tiny_model):
    assert codes(tiny_model()) == []
    assert codes(tiny_model(rope_parameters=dict(YARN))) == []
    assert codes(tiny_model().to(torch.float64)) == []
    patched = tiny_model()
    patch_model(patched, "yarn:4,ramp=rotations")
    assert codes(patched) == []
    assert codes(patched.to(torch.bfloat16)) == []  # patched models keep float32 frequencies


def test_an_edit_of_a_loaded_models_config_has_no_effect(tiny_model, tokens):
    model = tiny_model(rope_parameters=dict(YARN))
    before = model(tokens).logits
    model.config.rope_parameters = dict(EDITED)
    assert torch.equal(model(tokens).logits, before)  # that is the trap
    assert codes(model) == ["edited-after-load"]
    patched = tiny_model()
    patch_model(patched, "yarn:4")
    patched.config.rope_parameters = dict(EDITED)
    assert codes(patched) == ["edited-after-load"]


def test_rope_parameters_without_theta(tiny_model):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": "linear", "factor": 2.0}
    assert codes(model) == ["no-live-theta"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_lost_float32(tiny_model, dtype: torch.dtype):
    exact = tiny_model().model.rotary_emb.inv_freq
    model = tiny_model(max_position_embeddings=4096).to(dtype)
    (finding,) = check_model(model)
    assert (finding.code, finding.level) == ("frequencies-cast", "error")
    radians = float(re.search(r"up to (\S+) radians", finding.text)[1])
    expected = float((exact.to(dtype).double() - exact.double()).abs().max()) * 4096
    assert radians == pytest.approx(expected, rel=0.01)  # three digits are printed


def test_a_checkpoint_loaded_in_bfloat16_keeps_its_frequencies(tiny_model, tmp_path: Path):
    tiny_model().save_pretrained(tmp_path)
    assert codes(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)) == []


def test_a_dynamic_module_remembers_longer_inputs(tiny_model, tokens):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert codes(model) == []
    model(tokens)
    assert codes(model) == ["dynamic-state"]


def test_a_model_whose_code_has_other_constants(tiny_model):
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    model = tiny_model("mistral", rope_parameters=rope | {"finetuned": True})
    assert codes(model) == ["computes-otherwise"]


def test_a_rotary_module_that_is_not_used():
    config = FalconConfig(
        vocab_size=61, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, alibi=True, ffn_hidden_size=48
    )
    assert codes(FalconForCausalLM(config)) == ["alibi"]


# The command ----------------------------------------------------------------------------------------------------------


def written(folder: Path, config: Any) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(written(tmp_path, LLAMA))]) == 0
    assert "no findings" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 0  # the folder
    written(tmp_path, TRAPS["a misspelt key"][0])
    assert main(["inspect", str(tmp_path)]) == 1
    assert "Probably meant: 'beta_fast'." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{}/none"], "does not exist"),
        (["inspect", "none.json"], "does not exist"),
        (["inspect", "none"], "does not exist, and a hub name is OWNER/NAME"),
        (["inspect", ""], "must be a folder"),
        (["inspect", "{}/empty.json"], "says nothing about a model"),
        (["inspect", "{}/gguf/model.gguf"], "is a GGUF file"),
        (["inspect", "{}/picture.png"], "is not JSON, and not text"),
        (["inspect", "{}/null.json"], "holds null: must be a dictionary"),
        (["inspect", "{}/gguf"], "holds a GGUF file and no config.json"),
        (["inspect", "{}/adapter"], "holds an adapter and no config.json"),
        (["export", "{}/adapter", "--for", "vllm"], "holds an adapter and no config.json"),
        (["inspect", "{}"], "holds no config.json"),
        (["inspect", "{}/broken.json"], "is not JSON"),
        (["inspect", "{}/list.json"], "holds a list: must be a dictionary"),
        (["inspect", "{}/good.json", "--layer-type", "full"], "tells no layer types apart"),
        (["inspect", "{}/good.json", "--scaling", "yarm:8"], "did you mean 'yarn'?"),
        (["inspect", "{}/good.json", "--length", "0"], "--length 0 is not allowed"),
        (["inspect", "{}/good.json", "--plot", "x.pdf"], "must end in .svg or .png"),
        (["inspect", "{}/good.json", "--pot", "x.svg"], "unrecognized arguments: --pot"),
        (["inspect"], "MODEL_OR_CONFIG"),
        (["inspct", "x"], "unknown command 'inspct'; did you mean 'inspect'?"),
        ([], "a command is missing"),
        (["methods", "yarm"], "unknown method 'yarm'; did you mean 'yarn'?"),
        (["methods", "--figures", "{}", "--factor", "0.5"], "factor=0.5"),
        (["methods", "--figures", "{}", "--head-dim", "7"], "head_dim=7"),
    ],
)
def test_bad_input_is_one_line(arguments, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "good.json").write_text(json.dumps(LLAMA))
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "null.json").write_text("null")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name in ("gguf/model.gguf", "adapter/adapter_config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF\x03\x00\x00\x00")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and message in captured.err


def test_json_holds_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(written(tmp_path, QWEN)), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["label"] == "yarn x4" and RopeScaling.from_dict(said["scaling"]) == RopeScaling("yarn", 4, 32768, 1e6)
    assert (
        len(said["dimensions"]) == 64
        and {f["code"] for f in said["findings"]} == PUBLISHED["Qwen2.5 with the YaRN of its card"][2]
    )
    assert set(said["findings"][0]) == {"code", "level", "text", "remedy"}


def test_the_table_is_abbreviated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(written(tmp_path, QWEN))

    def rows(*flags: str) -> int:
        main(["inspect", path, *flags])
        return len(re.findall(r"^ +\d+ .* (kept|blended|interpolated)$", capsys.readouterr().out, re.MULTILINE))

    assert rows() == 16
    assert rows("--full") == 64


def test_plots(tmp_path: Path):
    path = written(tmp_path, PUBLISHED["Yarn-Llama-2-7b-64k"][0])
    assert main(["inspect", str(path), "--plot", str(tmp_path / "a.svg")]) == 0
    assert main(["inspect", str(path), "--plot", str(tmp_path / "b.png")]) == 0
    svg = (tmp_path / "a.svg").read_text()
    for text in ("L = 4096", "L' = 65536", "kept", "blended", "interpolated", "yarn x16", "unscaled"):
        assert f">{text}</text>" in svg
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_weights(tiny_model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_model("mistral", rope_parameters=dict(YARN) | {"finetuned": True}, max_position_embeddings=128)
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path), "--weights"]) == 1
    assert "[computes-otherwise]" in capsys.readouterr().out
    patch_model(model, "yarn:4,ramp=rotations")  # transformers cannot load this one
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path), "--weights", "--json"]) == 0


def test_a_closed_pipe_is_no_error():
    pipe = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from scaled_rope.cli import main; "
    code = pipe + "sys.exit(main(['methods']))"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (141, "")  # as of a program that SIGPIPE ended


# The list of methods and its documentation ----------------------------------------------------------------------------


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]):
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["dynamic"] == (METHODS[row["name"]].no_dynamic == "")
    natives = {row["name"]: row["native"] for row in rows}
    assert (natives["yarn"], natives["ntk"], natives["cope"]) == ("yarn", "default", None)
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: lines.index("")]] == ["method", *METHODS]
    assert max(map(len, lines)) <= 120
    for method in METHODS:
        assert main(["methods", method]) == 0
        assert METHODS[method].source in capsys.readouterr().out
    for row in rows:
        # A source is something that can be looked up.
        assert re.search(r"arXiv \d{4}\.\d{5}|\w\.\w+/\w", row["source"]), row["source"]
        assert row["formula"]


DOCS = ROOT / "docs" / "methods.md"
FIGURES = ROOT / "docs" / "images" / "methods"


def texts(path: Path) -> list[str]:
    """What is written in an SVG, in order."""
    return re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(), re.DOTALL)


def test_every_method_has_a_section_and_a_figure():
    text = DOCS.read_text()
    sections = re.findall(r"^### `(.+)`", text, re.MULTILINE)
    assert sections == list(METHODS)
    drawn = ["overview", *(name for name, row in METHODS.items() if row.kind == "frequency"), "resonance"]
    assert re.findall(r"\(images/methods/(.+)\.svg\)", text) == drawn
    assert sorted(path.name for path in FIGURES.iterdir()) == sorted(f"{name}.svg" for name in drawn)
    parts = dict(zip(sections, re.split(r"^### `.+`.*$", text, flags=re.MULTILINE)[1:], strict=True))
    for name, row in METHODS.items():
        for field in dataclasses.fields(row.params_type) if row.params_type else ():
            assert f"`{field.name}`" in parts[name], f"{field.name} of {name} is not documented"
        assert ("no dynamic form" in parts[name]) == bool(row.no_dynamic), name


def test_the_figures_can_be_drawn_again(tmp_path: Path):
    command = re.search(r"^scaled-rope methods --figures docs/images/methods(.*)$", DOCS.read_text(), re.MULTILINE)
    assert command is not None
    assert main(["methods", "--figures", str(tmp_path), *command[1].split()]) == 0
    for path in sorted(FIGURES.iterdir()):
        assert texts(tmp_path / path.name) == texts(path), path.name
    assert len(list(tmp_path.iterdir())) == len(list(FIGURES.iterdir()))
