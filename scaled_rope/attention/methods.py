"""Methods that change attention itself: which regions of positions each of them makes."""

from __future__ import annotations

from typing import Any

import scaled_rope.scaling.frequencies  # noqa: F401  (its rows come first)
from scaled_rope.attention import regions
from scaled_rope.attention.regions import Regions
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.parameters import DualChunkParams, LeakyReRopeParams, ReRopeParams, SelfExtendParams
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS, register

# ------------------------------------------------------------------------------------- methods that change attention


_ATTENTION: dict[str, Any] = {
    "kind": "attention",
    "fields": ("factor",),
    "factor_optional": True,
    "needs_original": True,
    "no_dynamic": "it has no scale",
}


@register(
    "rerope",
    params_type=ReRopeParams,
    source="ReRoPE (Su), kexue.fm/archives/9708",
    summary="attention: no distance beyond a window",
    **_ATTENTION,
)
def rerope(scaling: RopeScaling) -> Regions:
    """Relative position min(i - j, window)."""
    params: ReRopeParams = scaling.method_params
    length = _within_length(scaling, "window")
    return regions.rerope(params.window, length if params.logn else None)


@register(
    "leaky-rerope",
    params_type=LeakyReRopeParams,
    source="Leaky ReRoPE (Su), kexue.fm/archives/9728",
    summary="attention: distances beyond a window divided by k",
    **_ATTENTION,
)
def leaky_rerope(scaling: RopeScaling) -> Regions:
    """Relative position i - j within the window, window + (i - j - window)/k beyond."""
    params: LeakyReRopeParams = scaling.method_params
    length = _within_length(scaling, "window")
    return regions.leaky_rerope(params.window, params.k, length if params.logn else None)


@register(
    "self-extend",
    params_type=SelfExtendParams,
    source="Self-Extend, arXiv 2401.01325",
    summary="attention: positions beyond a window in groups",
    **_ATTENTION,
)
def self_extend(scaling: RopeScaling) -> Regions:
    """Relative position i - j for i - j < window, ⌊i/g⌋ - ⌊j/g⌋ + (window - ⌊window/g⌋) beyond."""
    params: SelfExtendParams = scaling.method_params
    _within_length(scaling, "window")
    return regions.self_extend(params.group, params.window)


@register(
    "dual-chunk",
    params_type=DualChunkParams,
    source="dual chunk attention, arXiv 2402.17463",
    summary="attention: positions within chunks",
    **_ATTENTION,
)
def dual_chunk(scaling: RopeScaling) -> Regions:
    """Keys at j mod S; the query at i mod S towards its own chunk, at min(S + (i mod S), L - 1) towards the chunk
    before, at L - 1 towards earlier ones."""
    params: DualChunkParams = scaling.method_params
    return regions.dual_chunk(params.chunk, _within_length(scaling, "chunk"))


def attention_regions(scaling: RopeScaling) -> Regions:
    """What a method of kind "attention" does to positions.

    Raises:
        ConfigError: a window, group or chunk that does not fit the trained length; a method of the other kind.
    """
    row = METHODS[scaling.method]
    if row.kind != "attention":
        raise ConfigError(f"method {scaling.method!r} changes frequencies, not attention")
    found: Regions = row.fn(scaling)
    return found


def _within_length(scaling: RopeScaling, name: str) -> int:
    """L, which the parameter has to be below."""
    length = scaling.original_max_position_embeddings
    assert length is not None  # validated by RopeScaling
    value = getattr(scaling.method_params, name)
    if value >= length:
        raise ConfigError(f"{name}={value}: must be below the trained length, {length} tokens")
    return length
