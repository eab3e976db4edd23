"""What mlx-lm makes of an export."""

from __future__ import annotations

import math
from typing import Any

import pytest
import transformers
from transformers import LlamaConfig

from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.export import export
from scaled_rope.serving.targets import mlx
from scaled_rope.serving.targets.common import Expressed, ServedModel
from tests.helpers.exports import HEAD_DIM

LONG = [1.0] * 4 + [2.0] * 2 + [6.5] * 2
L = {"original_max_position_embeddings": 512}
RUN = {
    "yarn": (
        {"type": "yarn", "factor": 4.0, **L, "beta_fast": 64.0, "beta_slow": 2.0, "mscale": 0.7},
        [1.0, 0.2569351, 0.0625, 0.01383497, 0.0025, 0.0007905694, 0.00025, 7.905694e-05],
        1.09704061,
    ),
    "llama3": (
        {"type": "llama3", "factor": 4.0, **L, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        [1.0, 0.3162278, 0.1, 0.02037183, 0.0025, 0.0007905694, 0.00025, 7.905694e-05],
        1.0,
    ),
    "longrope": (
        {"type": "longrope", **L, "short_factor": [1.0] * 8, "long_factor": LONG},
        [1.0, 0.3162278, 0.1, 0.03162278, 0.005, 0.001581139, 0.0001538462, 4.865043e-05],
        1.1055416,
    ),
}
"""Frequencies and factor of mlx-lm 0.32.2's `initialize_rope(16, 10000.0, False, …, 2048)`, run on a CPU."""


@pytest.mark.parametrize("name", RUN)
def test_the_restatement_is_what_its_own_modules_compute(name: str, config: LlamaConfig) -> None:
    scaling, inv_freq, factor = RUN[name]
    given = {"rope_theta": 1e4, "max_position_embeddings": 2048, "rope_scaling": scaling}
    request = ServedModel(RopeScaling("default"), config, HEAD_DIM, 2048)
    restated = mlx.restate(request, Expressed(given, {}), 2048)
    assert restated.inv_freq == pytest.approx(inv_freq, rel=1e-6)  # seven digits were noted
    assert restated.attention_factor == pytest.approx(factor, rel=1e-8)


def test_the_attention_factor_goes_into_mscale(config: LlamaConfig) -> None:
    for wanted in (1.0, 1.4):
        report = export(f"yarn:4,attention_factor={wanted}", config, "mlx")
        rope = report.config["rope_scaling"]
        assert report.status == "exact" and rope["type"] == rope["rope_type"] == "yarn"
        assert 1 + 0.1 * rope["mscale"] * math.log(4) == pytest.approx(wanted)
        assert any("mscale carries the attention factor" in note for note in report.notes)
    assert "mscale" not in export("yarn:4", config, "mlx").config["rope_scaling"]
    # Below 1 a table cannot have it either, and the ends of the ramp are always rounded.
    report = export("yarn:4,attention_factor=0.9,truncate=false", config, "mlx")
    assert report.status == "refused" and "mlx-lm computes frequencies up to" in report.reason


def test_most_classes_read_the_older_keys(config: LlamaConfig) -> None:
    report = export("ntk:4", config, "mlx")
    assert report.config["rope_theta"] == report.config["rope_parameters"]["rope_theta"] > 1e4
    assert "rope_scaling" not in report.config


TEXT: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}


@pytest.mark.parametrize(("model_type", "status"), [("qwen2", "exact"), ("gemma2", "refused"), ("falcon", "unknown")])
def test_classes_that_take_the_base_alone_are_refused_by_name(model_type: str, status: str) -> None:
    config = transformers.CONFIG_MAPPING[model_type](**TEXT, max_position_embeddings=512)
    report = export("yarn:4", config, "mlx")
    assert report.status == status
    if status == "refused":
        assert "its class for gemma2 models reads rope_theta and no scaling" in report.reason
        assert export("ntk:4", config, "mlx").status == "exact"
