"""What SGLang makes of an export."""

from __future__ import annotations

import json

from scaled_rope.scaling.record import RopeScaling, resolve_scaling
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
