"""Lengths that a config says in words of its family alone, or that its family is known for.

Where a config says no L, readers take max_position_embeddings for it. Of the models here that is known to be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scaled_rope.errors import is_positive_whole

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

    rope_type: str
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


def known_lengths(model: Mapping[str, Any], rope_type: str, factor: object) -> KnownLengths | None:
    """The lengths of a model whose config says no L; None where nothing is known beyond max_position_embeddings.

    Only for scalings whose frequencies do not depend on L. Those of others are what transformers makes of the config.

    Args:
        model: the text part of its config.
        rope_type: of the scaling that the config carries, and its factor as it is written.
    """
    context: Any = model.get("max_position_embeddings")
    if not is_positive_whole(context) or rope_type not in ("default", "linear"):
        return None
    family = _FAMILIES.get(str(model.get("model_type")))
    if family is not None and (rope_type, factor, context) == (
        family.rope_type,
        family.factor,
        family.lengths.extended,
    ):
        return family.lengths
    length: Any = dual_chunks(model.get(DUAL_CHUNK_KEY)).get("original_max_position_embeddings")
    if is_positive_whole(length) and length < context:
        return KnownLengths(int(length), None, f"{DUAL_CHUNK_KEY} does")
    return None


def dual_chunks(value: object) -> Mapping[str, Any]:
    """The settings of attention in chunks, from what a config has under `DUAL_CHUNK_KEY`; empty for most."""
    return value if isinstance(value, Mapping) else {}
