"""Formulas that several of the programs restate, in plain float64 Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def powers(base: float, dim: int) -> list[float]:
    """The unscaled frequencies base^(-2d/D) [D/2], radians per position."""
    return [base ** (-2 * d / dim) for d in range(dim // 2)]


def yarn_attention(factor: float) -> float:
    """The attention factor that every one of the programs has for YaRN unless told otherwise."""
    return 1.0 if factor <= 1 else 1.0 + 0.1 * math.log(factor)


def correction_range(
    dim: int, base: float, original: float, fast: float, slow: float, truncate: bool
) -> tuple[float, float]:
    """The ends of YaRN's ramp in dimensions, the same in all of the programs."""
    low, high = (dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base)) for turns in (fast, slow))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, dim - 1)


def blend(own: Sequence[float], factor: float, low: float, span: float, kept: float = 1.0) -> list[float]:
    """Frequencies between own / factor and own; `kept` multiplies the share of own ones."""
    share = [kept * (1 - min(1.0, max(0.0, (d - low) / span))) for d in range(len(own))]
    return [theta * (k + (1 - k) / factor) for theta, k in zip(own, share, strict=True)]


def restate_llama3(rope: Mapping[str, Any], dim: int) -> list[float]:
    """The frequencies of vLLM's and SGLang's `Llama3RotaryEmbedding`, and of llama.cpp's converter, which stores the
    quotients."""
    original, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    result = []
    for theta in powers(rope["rope_theta"], dim):
        turns = original * theta / (2 * math.pi)
        smooth = 1.0 if turns > high else 0.0 if turns < low else (turns - low) / (high - low) if low != high else 0.0
        result.append((1 - smooth) * theta / factor + smooth * theta)
    return result
