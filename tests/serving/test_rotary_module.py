"""Rotary modules of transformers, by a config alone."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from scaled_rope import RopeScaling, compute_rope
from scaled_rope.serving.rotary_module import (
    build_rotary_module,
    rotary_class,
    rotary_numbers,
    rotates_images,
    shares_one_table,
)


def config_of(model_type: str, **settings: object) -> transformers.PreTrainedConfig:
    config: transformers.PreTrainedConfig = transformers.CONFIG_MAPPING[model_type](**settings)
    return config


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "LlamaRotaryEmbedding"),
        ("qwen3_vl_text", "Qwen3VLTextRotaryEmbedding"),  # and not that of the vision part in the same module
        ("qwen2_5_omni_text", "Qwen2_5OmniRotaryEmbedding"),
        ("qwen3_omni_moe_talker_text", "Qwen3OmniMoeTalkerRotaryEmbedding"),
        ("internlm3", "LlamaRotaryEmbedding"),  # it has no models of its own
        ("gpt2", None),
        ("llava", None),  # its text part has one
    ],
)
def test_the_class_of_a_family(model_type: str, name: str | None) -> None:
    kind = rotary_class(config_of(model_type))
    assert (kind and kind.__name__) == name


def test_what_is_not_of_transformers_has_no_class() -> None:
    class Own(transformers.PreTrainedConfig):
        rope_parameters: dict[str, object] | None = None

    assert rotary_class(Own()) is None and build_rotary_module(Own()) is None


def test_a_rotary_embedding_of_images() -> None:
    assert rotates_images(config_of("eomt_dinov3")) and not rotates_images(config_of("llama"))


def test_numbers_are_those_of_the_module_at_a_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    rotary = build_rotary_module(config_of("llama", rope_parameters=rope, max_position_embeddings=64))
    scaling = RopeScaling("dynamic-ntk", 4.0, 64)
    for length in (64, 256):
        with torch.device("meta"):  # a default device of the caller says nothing of where the module is
            numbers = rotary_numbers(rotary, None, length)
        assert numbers is not None
        assert torch.allclose(numbers.inv_freq, compute_rope(scaling, 128, length)[0], rtol=1e-5, atol=0)


def test_the_attention_factor_is_that_of_the_tables() -> None:
    lists = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 4096}
    rope = {"rope_type": "longrope", **lists, "short_mscale": 1.25, "long_mscale": 1.5, "rope_theta": 1e4}
    rotary = build_rotary_module(config_of("phimoe", rope_parameters=rope))
    short, long = rotary_numbers(rotary, None, 4096), rotary_numbers(rotary, None, 4097)
    assert short is not None and long is not None
    assert (short.attention_factor, long.attention_factor) == pytest.approx((1.25, 1.5))


def test_numbers_per_layer_type() -> None:
    rotary = build_rotary_module(config_of("gemma3_text"))
    for layer_type, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)):
        numbers = rotary_numbers(rotary, layer_type)
        assert numbers is not None
        wanted = compute_rope(RopeScaling("default", rope_theta=theta), 256)[0]
        assert torch.allclose(numbers.inv_freq, wanted, rtol=1e-5, atol=0)
    assert rotary_numbers(rotary, "chunked_attention") is None


def test_whether_all_layers_share_one_table() -> None:
    assert shares_one_table(config_of("llama")) and shares_one_table(config_of("qwen2"))
    assert not shares_one_table(config_of("gemma3_text")) and not shares_one_table(config_of("gpt2"))


def test_axes_are_put_in_order() -> None:
    rotary = build_rotary_module(config_of("ernie4_5_vl_moe_text"))
    numbers = rotary_numbers(rotary)
    assert numbers is not None and bool((numbers.inv_freq.diff() < 0).all())


def test_a_module_without_frequencies_has_no_numbers() -> None:
    assert rotary_numbers(nn.Identity()) is None
