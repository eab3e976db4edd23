"""What ExLlamaV3 makes of an export."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from transformers import LlamaConfig

from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.export import export
from scaled_rope.serving.targets import exllamav3
from scaled_rope.serving.targets.common import Expressed, ServedModel
from tests.helpers.exports import HEAD_DIM

L = {"original_max_position_embeddings": 512}
RUN: dict[str, tuple[dict[str, Any], list[float], float]] = {
    "yarn": (  # the quotient of both lengths counts, not the factor
        {"rope_type": "yarn", "factor": 9.0, **L, "beta_fast": 64.0, "beta_slow": 2.0}
        | {"attention_factor": 1.25, "truncate": False},
        [1.0, 0.2539723, 0.05539864, 0.009639943, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.25,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 4.0, **L, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        [1.0, 0.3162278, 0.1, 0.02037183, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
    "longrope": (
        {"rope_type": "longrope", **L, "short_factor": [1.0] * 8, "long_factor": [1.0] * 4 + [2.0] * 2 + [6.5] * 2},
        [1.0, 0.3162278, 0.1, 0.03162278, 0.005, 0.001581139, 0.0001538462, 4.865043e-05],
        1.1055416,
    ),
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        [0.25, 0.07905694, 0.025, 0.007905695, 0.0025, 0.0007905695, 0.00025, 7.905695e-05],
        1.0,
    ),
}
"""Frequencies and factor of ExLlamaV3 1.6.5's `RoPE` with D = 16, θ = 10000 and 2048 positions, run on a CPU."""


@pytest.mark.parametrize("name", RUN)
def test_the_restatement_is_what_its_own_module_computes(name: str, config: LlamaConfig) -> None:
    rope, inv_freq, factor = RUN[name]
    request = ServedModel(RopeScaling("default"), config, HEAD_DIM, 2048)
    given = rope | {"rope_theta": 1e4, "context": 2048}
    restated = exllamav3.restate(request, Expressed(given, {}), 2048)
    assert restated.inv_freq == pytest.approx(inv_freq, rel=1e-6)  # seven digits were noted
    assert restated.attention_factor == pytest.approx(factor, rel=1e-8)


def test_the_maximum_is_the_factor_times_the_original_length(config: LlamaConfig) -> None:
    for length in (1000, 2048):
        report = export("yarn:4", config, "exllamav3", length=length)
        assert report.status == "exact" and report.config["max_position_embeddings"] == 2048
    odd = export("yarn:2.001", config, "exllamav3")  # 1024.512 positions: only a list of frequencies says it
    assert odd.status == "exact" and odd.config["rope_parameters"]["rope_type"] == "longrope"


def test_a_family_whose_reader_was_not_looked_at_is_unknown() -> None:
    config = transformers.CONFIG_MAPPING["stablelm"](
        hidden_size=64, num_attention_heads=4, num_hidden_layers=1, max_position_embeddings=512
    )
    assert export("yarn:4", config, "exllamav3").status == "unknown"
