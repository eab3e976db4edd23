"""What vLLM makes of an export."""

from __future__ import annotations

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
