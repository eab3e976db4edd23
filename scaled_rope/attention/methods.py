"""Methods that change attention itself: the regions of positions of each."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from scaled_rope.attention import regions
from scaled_rope.attention.regions import Regions
from scaled_rope.errors import ConfigError
from scaled_rope.scaling.parameters import DpeParams, DualChunkParams, LeakyReRopeParams, ReRopeParams, SelfExtendParams
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.temperature import compute_temperature


def rerope(scaling: RopeScaling) -> Regions:
    """Relative position min(i - j, window)."""
    params: ReRopeParams = scaling.method_params
    return regions.rerope(params.window)


def leaky_rerope(scaling: RopeScaling) -> Regions:
    """Relative position i - j within the window, window + (i - j - window)/k beyond."""
    params: LeakyReRopeParams = scaling.method_params
    return regions.leaky_rerope(params.window, params.k)


def self_extend(scaling: RopeScaling) -> Regions:
    """Relative position i - j for i - j < window, ⌊i/g⌋ - ⌊j/g⌋ + (window - ⌊window/g⌋) beyond."""
    params: SelfExtendParams = scaling.method_params
    return regions.self_extend(params.group, params.window)


def dpe(scaling: RopeScaling) -> Regions:
    """Relative position i - j for i - j < window, ⌊i/g⌋ - ⌊j/g⌋ + (window - ⌊window/g⌋) beyond, with a g of its own for
    each group of pairs of dimensions."""
    params: DpeParams = scaling.method_params
    return regions.dpe(params.groups, params.window)


def dual_chunk(scaling: RopeScaling) -> Regions:
    """Keys at j mod S; the query at i mod S towards its own chunk, at min(S + (i mod S), L - 1) towards the chunk
    before, at L - 1 towards earlier ones."""
    params: DualChunkParams = scaling.method_params
    return regions.dual_chunk(params.chunk, _trained_length(scaling))


def attention_regions(scaling: RopeScaling) -> Regions:
    """The regions of positions of a method of kind "attention", with the temperature of the scaling.

    Raises:
        ConfigError: the method changes frequencies.
    """
    row = METHODS[scaling.method]
    if row.kind != "attention":
        raise ConfigError(f"method {scaling.method!r} changes frequencies, not attention")
    found: Regions = row.fn(scaling)
    if scaling.attention_temperature is None:
        return found
    return replace(found, temperature=partial(compute_temperature, scaling))


def _trained_length(scaling: RopeScaling) -> int:
    """L; the record has checked that windows and chunks are below it."""
    assert scaling.original_max_position_embeddings is not None
    return scaling.original_max_position_embeddings
