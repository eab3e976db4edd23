"""Attention temperature: a multiplier of the logits of each query, which goes with any scaling.

A longer text gives a query more keys to share its attention among, and so blunts it. A multiplier above 1 sharpens it
again. YaRN's attention factor, which multiplies cos and sin and so queries and keys alike, is one such multiplier, the
same for all queries; it remains a matter of tables (`scaling.frequencies`). Those here multiply the query alone, so
that cached keys stay right whatever they grow to, and layers without rotary embedding have them too.

i is the position of a query, counted from 0; L the original context length; s the scale in effect.

- "constant": 1 + slope·ln s. DroPE (arXiv 2512.12167).
- "log": 1 + slope·ln(n/L) for a query that sees n > L keys, else 1. With the default slope 1/ln L that is ln n / ln L:
  the factor of ReRoPE (kexue.fm/archives/9708), and SSMax (arXiv 2501.19399) for models that were not trained with it.
  n = i + 1, or the window where a layer has one and it is shorter.
- "llama4": 1 + slope·ln(1 + ⌊(i+1)/L⌋), on layers without rotary embedding only. Llama 4, as in transformers.
- "ministral": 1 + slope·ln(1 + ⌊i/L⌋), on all layers. Ministral 3, as in transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scaled_rope.scaling.frequencies import compute_scale
from scaled_rope.scaling.record import RopeScaling


def compute_temperature(
    scaling: RopeScaling, positions: Tensor, seq_len: Tensor | None = None, window: int | None = None
) -> Tensor:
    """The multipliers of the logits of queries, under the temperature of a scaling.

    Args:
        positions: [..., T], of the queries, whole numbers from 0 (below 0: padding, which gets 1).
        seq_len: [...], l' of each row in tokens, for "constant" under dynamic scaling; None: s = factor.
        window: how many keys a query sees at most, itself included; None: all before it.

    Returns:
        [..., T], float64 (float32 where the device has no other), at least 1; all 1 without a temperature.
    """
    dtype = torch.float32 if positions.device.type == "mps" else torch.float64
    at, kind, slope = positions.to(dtype), scaling.attention_temperature, scaling.effective_temperature_slope
    if kind is None:
        return torch.ones_like(at)
    if kind == "constant":
        s = torch.full_like(at, scaling.factor)
        if seq_len is not None:
            s = compute_scale(scaling, seq_len.to(at))[..., None]
        return (1 + slope * s.log()).expand(at.shape)
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    original = scaling.original_max_position_embeddings
    if kind == "log":
        seen = at + 1 if window is None else (at + 1).clamp(max=window)
        return 1 + slope * (seen / original).clamp(min=1).log()
    periods = ((at + 1 if kind == "llama4" else at) / original).floor()
    return 1 + slope * (1 + periods.clamp(min=0)).log()


def follows_position(scaling: RopeScaling) -> bool:
    """Whether the multiplier of a query depends on its position."""
    return scaling.attention_temperature not in (None, "constant")
