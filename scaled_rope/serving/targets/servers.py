"""Arithmetic that vLLM and SGLang share, since their rotary modules have the same origin."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.patching.families import ADAPTERS
from scaled_rope.serving.targets.arithmetic import blend, correction_range, powers, restate_llama3
from scaled_rope.serving.targets.common import ServedModel, table_notes, table_of

CACHED = "{} computes one table for all lengths and caches rotated keys"
"""Why they follow no sequence's length; {} is the program."""
CONFIG_PLACE = "or, instead of flags, in config.json"


_INTERLEAVED = (
    *(name for name, adapter in ADAPTERS.items() if adapter.layout == "interleaved"),
    *("cohere2_moe", "deepseek_v2", "deepseek_v3", "glm4", "sarvam_moe"),
)
"""Families that rotate neighbouring dimensions, for which these programs have no LongRoPE."""


def check_halves(request: ServedModel) -> None:
    """Raise a ConfigError for LongRoPE in a family that does not rotate the halves of a head."""
    if request.model_type in _INTERLEAVED:
        raise ConfigError(f"its LongRoPE refuses the rotation of {request.model_type} models (only neox_style)")


def check_axes(request: ServedModel, rope: Mapping[str, Any]) -> None:
    """Raise a ConfigError for a type that has no form with several axes, in a model that needs them for images."""
    if "mrope_section" in rope and rope["rope_type"] not in ("default", "yarn"):
        raise ConfigError(
            f"rope_type {rope['rope_type']!r} has no form there with mrope_section, which the model needs for images"
        )


def table_with_mscales(request: ServedModel) -> dict[str, Any]:
    """`table_of` with the attention factor under the names that these programs read."""
    rope = table_of(request)
    return rope | {"short_mscale": rope["attention_factor"], "long_mscale": rope["attention_factor"]}


def table_with_length(request: ServedModel) -> dict[str, Any]:
    """`table_of` with an original length of which programs that know no `attention_factor` make that factor.

    They compute sqrt(1 + ln(N/L) / ln(L)), which is A at L = N^(1/A²). A is 1 or more.
    """
    rope = table_of(request)
    factor = rope["attention_factor"]
    original = request.length if factor == 1 else request.length ** (1 / factor**2)
    return rope | {"original_max_position_embeddings": original}


def table_notes_for_one(request: ServedModel) -> tuple[str, ...]:
    """Notes about `table_with_length`."""
    note = "original_max_position_embeddings is not the model's: the attention factor follows from it there"
    return (*table_notes(request), note)


def plain_frequencies(rope: Mapping[str, Any], dim: int) -> list[float]:
    """Frequencies of the rope types default, linear and llama3, whose attention factor is 1."""
    if rope["rope_type"] == "llama3":
        return restate_llama3(rope, dim)
    divisor = rope["factor"] if rope["rope_type"] == "linear" else 1.0
    return [theta / divisor for theta in powers(rope["rope_theta"], dim)]


def yarn_frequencies(rope: Mapping[str, Any], dim: int) -> list[float]:
    """The frequencies of `YaRNScalingRotaryEmbedding`."""
    base, original = rope["rope_theta"], rope["original_max_position_embeddings"]
    fast, slow = (32.0 if rope.get("beta_fast") is None else rope["beta_fast"]), rope.get("beta_slow")
    truncate = rope.get("truncate", True)
    low, high = correction_range(dim, base, original, fast, 1.0 if slow is None else slow, truncate)
    span = 0.001 if low == high else high - low
    kept = rope.get("extrapolation_factor", 1.0)
    return blend(powers(base, dim), rope["factor"], low, span, kept)


def mscale_pair(rope: Mapping[str, Any]) -> float | None:
    """The quotient that `mscale` and `mscale_all_dim` stand for when both are given."""
    one, other = rope.get("mscale"), rope.get("mscale_all_dim")
    if not one or not other:
        return None
    log_factor = math.log(max(rope["factor"], 1.0))
    return float((1 + 0.1 * one * log_factor) / (1 + 0.1 * other * log_factor))


def longrope_numbers(rope: Mapping[str, Any], dim: int, long: bool, context: int) -> tuple[list[float], float]:
    """Frequencies and attention factor of `Phi3LongRoPEScaledRotaryEmbedding`, which reads no `attention_factor`."""
    name = "long" if long else "short"
    original = rope["original_max_position_embeddings"]
    scale = context / original
    default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    mscale = rope.get(f"{name}_mscale")
    inv_freq = [a / b for a, b in zip(powers(rope["rope_theta"], dim), rope[f"{name}_factor"], strict=True)]
    return inv_freq, default if mscale is None else mscale
