"""Every scaling method with parameters, for tests that go over all of them."""

from __future__ import annotations

from typing import Any

from scaled_rope import METHODS, RopeScaling

VARIANTS: list[dict[str, Any]] = [
    {"method": "linear"},
    {"method": "ntk"},
    {"method": "ntk-by-parts"},
    {"method": "ntk-by-parts", "ramp": "rotations"},
    {"method": "ntk-by-parts", "truncate": False},
    {"method": "ntk-by-parts", "extrapolation_factor": 0.5},
    {"method": "yarn"},
    {"method": "yarn", "ramp": "rotations", "beta_fast": 16.0, "beta_slow": 2.0, "extrapolation_factor": 0.25},
    {"method": "yarn", "truncate": False, "beta_fast": 128.0, "beta_slow": 2.0, "mscale": 0.7},
    {"method": "part-ntk"},
    {
        "method": "part-ntk",
        "extrapolation_factor": 0.5,
        "params": {"linear_above": 0.5, "ntk_above": 2.0, "blend_above": 3.0, "keep_above": 40.0},
    },
    {"method": "llama3"},
    {"method": "llama3", "params": {"low_freq_factor": 2.0, "high_freq_factor": 32.0}},
    {"method": "llama3", "params": {"high_freq_factor": 1.0}},
    {"method": "ntk-mixed"},
    {"method": "ntk-mixed", "params": {"exponent": 1.5}},
]
"""Interpolating methods, all with a dynamic form: factor 1 changes nothing."""
OTHERS: list[dict[str, Any]] = [
    {"method": "dynamic-ntk"},
    {"method": "longrope", "params": {"short_factor": "short", "long_factor": "long"}},
    {"method": "longrope", "attention_factor": 1.25, "params": {"short_factor": "ones", "long_factor": "long"}},
    {"method": "abf", "params": {"theta": 7e5}},
    {"method": "proportional"},
    {"method": "proportional", "params": {"fraction": 0.3}},
    {"method": "cope", "params": {"clip": 3}},
    {"method": "cope", "params": {"clip": 1}},
    {"method": "cope", "params": {"clip": 2, "theta": 7e5}},
    {"method": "hardclip", "params": {"clip": 2}},
    {"method": "drope"},
    {"method": "hardclip", "params": {"clip": 2, "theta": 7e5}},
]
UNSCALED = {"method": "default"}
ALL = [UNSCALED, *VARIANTS, *OTHERS]


def name_of(variant: dict[str, Any]) -> str:
    values = [*(v for v in variant.values() if v is not variant.get("params")), *variant.get("params", {}).values()]
    return "-".join(map(str, values))


def make(variant: dict[str, Any], head_dim: int, factor: float = 1.0, **fields: Any) -> RopeScaling:
    """A record of a variant above; LongRoPE's lists get the width that they need."""
    params = dict(variant.get("params", {}))
    for name in ("short_factor", "long_factor"):
        if name in params:
            rise = {"ones": 0.0, "short": 0.5, "long": 30.0}[params[name]]
            params[name] = [1 + rise * d / head_dim for d in range(head_dim // 2)]
    if "factor" in METHODS[variant["method"]].fields:
        fields["factor"] = factor
    return RopeScaling(**({"original_max_position_embeddings": 4096} | variant | fields | {"params": params}))
