"""What SGLang makes of an export."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.serving.export import export
from tests.helpers.exports import flags_of, make_config


def test_sglang_flags_silence_what_the_checkpoint_carries() -> None:
    carried = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512}
    config = make_config(rope_parameters=carried | {"beta_fast": 64.0, "mscale": 0.7, "mscale_all_dim": 1.0})
    for spec in ("default", "linear:4", "yarn:8"):
        scaling = resolve_scaling(spec, RopeScaling("default", original_max_position_embeddings=512))
        report = export(scaling, config, "sglang")
        assert report.status == "exact"
        override = json.loads(flags_of(report)["--json-model-override-args"])["rope_parameters"]
        assert set(override) >= set(config.rope_parameters)
        assert override["mscale"] is None


TEXT: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"num_hidden_layers": 1, "vocab_size": 61, "max_position_embeddings": 4096},
}
AXES = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}


def test_a_language_model_that_is_built_from_the_whole_config_is_told_there() -> None:
    config = transformers.CONFIG_MAPPING["qwen2_5_vl"](text_config=TEXT | {"rope_parameters": AXES})
    report = export("yarn:4", config, "sglang")
    override = json.loads(flags_of(report)["--json-model-override-args"])
    assert report.status == "exact" and override["rope_parameters"] == override["text_config"]["rope_parameters"]
    assert override["rope_parameters"]["factor"] == 4.0 and list(report.config) == ["text_config"]


@pytest.mark.parametrize(
    ("model_type", "text_type", "status"), [("llava", "llama", "exact"), ("aya_vision", "cohere2", "unknown")]
)
@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_composite_class_that_was_not_read_is_unknown(
    model_type: str, text_type: str, status: str, target: str
) -> None:
    config = transformers.CONFIG_MAPPING[model_type](text_config={"model_type": text_type, **TEXT})
    report = export("yarn:4", config, target)
    assert report.status == status
    assert any(f"its code for {model_type!r} passes on" in note for note in report.notes) == (status == "unknown")
