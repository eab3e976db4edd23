"""Lengths that a config.json says in words of its family alone, or that its family is known for.

Where a config says no L, readers take max_position_embeddings for it. Of the models here that is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from scaled_rope.errors import is_positive_whole
from scaled_rope.scaling.record import RopeScaling, RopeSettings

DUAL_CHUNK_KEY = "dual_chunk_attention_config"
"""Qwen2.5-1M's key for Dual Chunk Attention, by which it reads beyond the length of its training."""


@dataclass(frozen=True)
class KnownLengths:
    """The lengths of a model whose config says no L, in tokens."""

    original: int
    extended: int | None
    """The length that its own scaling is for, where that is not factor times L; None where it is."""
    source: str
    """How they are known, as a clause."""


@dataclass(frozen=True)
class _Published:
    """A scaling as the models of a family are published with it."""

    method: str
    factor: float
    lengths: KnownLengths


_FAMILIES = {
    "gemma3_text": _Published(
        "linear",
        8.0,
        KnownLengths(
            32768,
            131072,
            "Gemma 3 was trained at 32768 tokens and extended to 131072, which its config says; the factor 8 is not "
            "their quotient",
        ),
    ),
}


def known_lengths(config: Any, own: RopeScaling) -> KnownLengths | None:
    """The lengths of a model; None where nothing is known beyond what its config says in the usual words.

    Args:
        config: its text part, an object of transformers or a dictionary.
        own: the scaling that is read from it; L of `own` is max_position_embeddings where the config says no L.
    """
    context = _value(config, "max_position_embeddings")
    if not is_positive_whole(context) or own.original_max_position_embeddings != context:
        return None
    family = _FAMILIES.get(str(_value(config, "model_type")))
    if family is not None and (own.method, own.factor, context) == (
        family.method,
        family.factor,
        family.lengths.extended,
    ):
        return family.lengths
    length: Any = dual_chunks(config).get("original_max_position_embeddings")
    if is_positive_whole(length) and length < context:
        return KnownLengths(int(length), None, f"{DUAL_CHUNK_KEY} does")
    return None


def dual_chunks(config: Any) -> Mapping[str, Any]:
    """The settings of attention in chunks in a config, see `DUAL_CHUNK_KEY`; empty for most."""
    value = _value(config, DUAL_CHUNK_KEY)
    return value if isinstance(value, Mapping) else {}


def with_known_length(scaling: RopeScaling, config: Any) -> RopeScaling:
    """The scaling that a config carries, with the L that is known of the model."""
    known = known_lengths(config, scaling)
    return scaling if known is None else replace(scaling, original_max_position_embeddings=known.original)


def own_scaling(config: Any) -> RopeScaling:
    """The scaling that an object of transformers carries, with the L that is known of the model.

    Raises:
        ConfigError: as `RopeScaling.from_config`.
    """
    return with_known_length(RopeSettings(config).scaling, config)


def length_for(config: Any, scaling: RopeScaling) -> int | None:
    """`RopeSettings.length_for`, with the lengths that are known of the model.

    Raises:
        ConfigError: as `RopeScaling.from_config`.
    """
    settings = RopeSettings(config)
    known = known_lengths(config, settings.scaling)
    own = settings.scaling
    if known is not None and known.extended is not None and scaling in (own, with_known_length(own, config)):
        return known.extended
    return settings.length_for(scaling)


def reach_of(config: Any) -> int | None:
    """How far a model reaches by the scaling that it carries, where that is known not to be factor times L."""
    known = known_lengths(config, RopeSettings(config).scaling)
    return None if known is None else known.extended


def _value(config: Any, name: str) -> Any:
    if isinstance(config, Mapping):
        return config.get(name)
    try:
        return getattr(config, name, None)
    except RuntimeError:  # differs between layers, as in Gemma 4
        return None
