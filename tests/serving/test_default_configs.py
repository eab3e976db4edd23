"""What a family's class makes of no settings, inspected: one of each way to lay a config out."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import transformers

from scaled_rope.serving import default_configs
from scaled_rope.serving.default_configs import inspect_default

SAME = (
    *("llama", "glm", "mistral4", "deepseek_v2", "deepseek_v3", "deepseek_v4", "gpt_oss", "phimoe", "cohere2_moe"),
    *("gemma3", "gemma4", "zaya", "dory", "neomme", "dots3_note", "laguna"),  # per layer type, some with other heads
    *("llava", "qwen2_5_omni", "colqwen2", "colmodernvbert", "t5gemma2", "pi0", "musicflamingo"),  # composite
    *("qwen2_5_vl", "qwen3_vl", "qwen3_5_moe", "glm4v", "ernie4_5_vl_moe", "hunyuan_vl"),  # several axes
)


@pytest.mark.parametrize("model_type", SAME)
def test_inspection_shows_the_numbers_of_the_family(model_type: str) -> None:
    assert inspect_default(transformers.CONFIG_MAPPING[model_type]()).verdict == "same"


@pytest.mark.parametrize(
    ("model_type", "verdict", "detail"),
    [
        ("gpt2", "no RoPE of text", ""),
        ("pixtral", "no RoPE of text", ""),  # RoPE of patches in two dimensions
        ("dinov3_vit", "no RoPE of text", ""),
        ("musicgen", "no RoPE of text", ""),
        ("glm4_moe", "refused", "head_dim=42: 21 rotated dimensions"),
        ("cohere_compass", "not compared", "transformers builds no rotary module of it"),
        ("granite4_vision", "not compared", "no rotary module for Granite4VisionTextConfig was found"),
    ],
)
def test_what_cannot_be_compared_says_why(model_type: str, verdict: str, detail: str) -> None:
    finding = inspect_default(transformers.CONFIG_MAPPING[model_type]())
    assert finding.verdict == verdict and finding.detail.startswith(detail) and "\n" not in finding.detail


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Any = default_configs.inspect

    def off(*args: Any) -> Any:
        report = real(*args)
        halved = (dataclasses.replace(d, scaled=d.scaled / 2) for d in report.dimensions)
        return dataclasses.replace(report, dimensions=tuple(halved))

    monkeypatch.setattr(default_configs, "inspect", off)
    finding = inspect_default(transformers.CONFIG_MAPPING["llama"]())
    assert finding.verdict == "differs" and "all layers: frequencies up to 2.00 times off" in finding.detail
