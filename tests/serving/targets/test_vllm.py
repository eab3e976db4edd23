"""What vLLM makes of an export."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import LlamaConfig

from scaled_rope.serving.export import export
from tests.helpers.exports import flags_of


def test_vllm_multiplies_the_maximum_by_a_linear_factor_only(config: LlamaConfig) -> None:
    linear, yarn = export("linear:4", config, "vllm"), export("yarn:4", config, "vllm")
    assert (linear.config["max_position_embeddings"], yarn.config["max_position_embeddings"]) == (512, 2048)
    assert flags_of(linear)["--max-model-len"] == flags_of(yarn)["--max-model-len"] == "2048"
    # An integer factor would not be taken for a number there.
    assert '"factor": 4.0' in flags_of(linear)["--hf-overrides"]


def test_vllm_serves_no_more_positions_than_its_table_has(config: LlamaConfig) -> None:
    longer = export("yarn:4", config, "vllm", length=3000)
    assert longer.status == "exact"
    assert longer.config["rope_parameters"]["rope_type"] == "longrope"
    assert export("yarn:4", config, "vllm", length=2048).config["rope_parameters"]["rope_type"] == "yarn"


AXES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
TEXT: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 1, "vocab_size": 61, "rope_parameters": AXES},
}


@pytest.mark.parametrize(("model_type", "written"), [("qwen2_vl", 1024), ("qwen2_5_vl", 1024), ("qwen3_vl", 4096)])
def test_the_ramp_of_several_axes_is_that_of_a_longer_model(model_type: str, written: int) -> None:
    """Run by itself, vLLM 0.33's `MRotaryEmbedding` with L has the frequencies of its YaRN with 4·L."""
    config = transformers.CONFIG_MAPPING[model_type](text_config=TEXT | {"max_position_embeddings": 4096})
    report = export("yarn:4", config, "vllm")
    assert report.status == "exact"
    rope = report.config["text_config"]["rope_parameters"]
    assert rope["original_max_position_embeddings"] == written and rope["mrope_section"] == [2, 3, 3]
    assert any("these settings are for vLLM alone" in note for note in report.notes) == (written != 4096)
    # A length that has no quarter has no words there.
    odd = transformers.CONFIG_MAPPING[model_type](text_config=TEXT | {"max_position_embeddings": 4098})
    assert export("yarn:4", odd, "vllm").status == ("refused" if written != 4096 else "exact")
