"""Every value of a scaling in effect, and where it is from: the head of a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

from scaled_rope.errors import ConfigError, is_number
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import PRIMARY_LAYER_TYPE, attention_keys
from scaled_rope.scaling.record import RopeScaling, native_type
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving.checks_transformers import PHI3_TYPES
from scaled_rope.serving.checks_use import softmax_scale
from scaled_rope.serving.config_facts import ConfigFacts
from scaled_rope.serving.inspect_report import Number


def numbers_in_effect(facts: ConfigFacts, codes: Collection[str]) -> Iterator[Number]:
    """Nothing for a config without a readable scaling. codes: those of the findings.

    Raises:
        ConfigError: an attention factor that depends on the length and cannot be computed.
    """
    scaling = facts.scaling
    if scaling is None:
        return
    yield from _kind(facts, scaling)
    yield from _model(facts, scaling, codes)
    row = METHODS[scaling.method]
    shown = "" if not facts.shown else f"shown at {facts.shown} tokens"
    yield Number("dynamic", scaling.dynamic or row.length_dependent, shown)
    if scaling.attention_temperature is not None:
        yield Number("attention_temperature", scaling.attention_temperature, "of queries, by this package alone")
        slope = scaling.effective_temperature_slope
        yield Number("temperature_slope", slope, _set(scaling.temperature_slope))
    if scaling.resonance:
        yield Number("resonance", True, "wavelengths are whole numbers")
    yield from _parameters(facts, scaling)
    yield _attention_factor(facts, scaling)
    if facts.spec is None:
        yield from _of_attention(facts, scaling)
    if facts.spec is None:
        yield Number("finetuned", bool(facts.entry.get("finetuned")), _origin(facts, "finetuned"))


def _origin(facts: ConfigFacts, *names: str) -> str:
    """Whether one of these keys is written."""
    written = {**facts.text, **facts.entry}
    return "config" if any(written.get(key) is not None for key in names) else "default"


def _kind(facts: ConfigFacts, scaling: RopeScaling) -> Iterator[Number]:
    """Which scaling it is, of which layers."""
    row = METHODS[scaling.method]
    yield Number("method", scaling.method, f"{row.summary} ({row.source})")
    if facts.layer_type or facts.nested:
        yield Number("layer type", facts.layer_type or PRIMARY_LAYER_TYPE)
    if facts.spec is None and facts.entry:
        yield Number("rope_type", facts.rope_type, "config")
    if "factor" in row.fields and not (row.factor_optional and scaling.factor == 1):
        written = "config" if _origin(facts, "factor") == "config" else "derived"
        yield Number("factor", scaling.factor, "spec" if facts.spec else written)


def _model(facts: ConfigFacts, scaling: RopeScaling, codes: Collection[str]) -> Iterator[Number]:
    """L, base and heads."""
    original = scaling.original_max_position_embeddings
    said = "config" if facts.original_is_written else "from max_position_embeddings"
    said = said if facts.known is None else "known of the model"
    said += ", may be the extended length" if {"unknown-original", "factor-twice"} & set(codes) else ""
    yield Number("original_max_position_embeddings", original, said if original is not None else "not said")
    yield Number("rope_theta", scaling.rope_theta, _origin(facts, "rope_theta", "rotary_emb_base"))
    if facts.head_dim is None:
        return
    yield Number("head_dim", facts.head_dim, "config" if facts.text.get("head_dim") else "derived")
    try:
        dim: int | None = scaling.rotary_dim(facts.head_dim)
    except ConfigError:
        dim = None  # `uncomputable_frequencies` reports it
    yield Number("partial_rotary_factor", scaling.partial_rotary_factor, _origin(facts, "partial_rotary_factor"))
    yield Number("rotated dimensions", dim, "derived")


def _parameters(facts: ConfigFacts, scaling: RopeScaling) -> Iterator[Number]:
    """The parameters of the method besides the factor."""
    row = METHODS[scaling.method]
    if "ramp" in row.fields:
        fast, slow = scaling.ramp_bounds
        yield Number("beta_fast", fast, _set(scaling.beta_fast))
        yield Number("beta_slow", slow, _set(scaling.beta_slow))
        yield Number("ramp", scaling.ramp or "dimension", _set(scaling.ramp))
        if scaling.ramp != "rotations":
            yield Number("truncate", scaling.truncate is not False, _set(scaling.truncate))
        share = scaling.extrapolation_factor
        yield Number("extrapolation_factor", 1.0 if share is None else share, _set(share))
    if "mscale" in row.fields and scaling.attention_factor is None:
        yield Number("mscale", 1.0 if scaling.mscale is None else scaling.mscale, "in 0.1·mscale·ln(s) + 1")
    if row.params_type is not None:
        for f in dataclasses.fields(row.params_type):
            written = facts.spec is None and facts.entry.get(f.name) is not None
            origin = "config" if written else "set" if f.name in scaling.params else "default"
            yield Number(f.name, getattr(scaling.method_params, f.name), origin)


def _set(value: Any) -> str:
    return "default" if value is None else "set"


def _attention_factor(facts: ConfigFacts, scaling: RopeScaling) -> Number:
    attention = scaling.static_attention_factor
    if scaling.dynamic and facts.head_dim is not None:
        attention = compute_rope(scaling, facts.head_dim, facts.shown)[1]
    source = "set" if scaling.attention_factor is not None else "derived"
    return Number("attention factor √(1/t)", attention, f"{source}; t = {1 / attention**2:.4g}")


def _of_attention(facts: ConfigFacts, scaling: RopeScaling) -> Iterator[Number]:
    """The numbers that a family's attention takes from the RoPE dictionary beside frequencies and factor."""
    softmax = softmax_scale(facts)
    if softmax != 1:
        yield Number("softmax scale times", softmax, "(0.1·mscale_all_dim·ln(s) + 1)², in attention")
    beta = facts.entry.get("llama_4_scaling_beta")
    original = scaling.original_max_position_embeddings
    if is_number(beta) and "llama_4_scaling_beta" in attention_keys(facts.model_type) and original:
        yield Number(
            "llama_4_scaling_beta", beta, f"queries times 1 + beta·ln(1 + ⌊position/{original}⌋), in attention"
        )


def lengths_in_effect(facts: ConfigFacts, codes: Collection[str]) -> dict[str, int | None]:
    """`Inspection.lengths`. codes: those of the findings."""
    scaling = facts.scaling
    extends = scaling is not None and scaling.factor > 1
    extends = extends and scaling is not None and METHODS[scaling.method].factor_times_original != "least"
    twice = "factor-twice" in codes and scaling is not None and not METHODS[scaling.method].needs_original
    extends = extends and "unknown-original" not in codes and not twice
    extended = facts.reach if extends else None
    return {
        "original": scaling.original_max_position_embeddings if scaling is not None else None,
        "extended": extended,
        "max_position_embeddings": facts.context,
        "sliding_window": facts.window,
        "shown": facts.shown,
    }


def native_rope_type(facts: ConfigFacts) -> str | None:
    """The rope_type by which transformers can express the scaling in this family, or None."""
    if facts.scaling is None:
        return None
    name = native_type(facts.scaling, facts.head_dim)
    return name if facts.model_type != "phi3" or name in PHI3_TYPES else None
