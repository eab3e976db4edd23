"""Small formulas that the record and the methods share, for numbers and tensors alike, without torch.

The methods themselves (YaRN, NTK-aware, position interpolation, ...) are in `frequencies.py`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

from scaled_rope.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")


def ntk_theta(theta: float, factor: Number, dim: int) -> Number:
    """b' = b·s^(D/(D-2)), equation 16 of the YaRN paper; `factor` may be a tensor of any shape."""
    if dim < 4:
        raise ConfigError(f"{dim} rotated dimensions: a change of base for a factor needs at least 4")
    base: Number = theta * factor ** (dim / (dim - 2))
    return base


def attention_factor_of(log_factor: Number, mscale: float) -> Number:
    """sqrt(1/t) = 0.1·mscale·ln(s) + 1 from ln(s), equation 22 of the YaRN paper (there mscale = 1)."""
    return 0.1 * mscale * log_factor + 1.0


def longrope_attention_factor(factor: float, original: int) -> float:
    """sqrt(1 + ln(s) / ln(L)), LongRoPE (arXiv 2402.13753); 1 for s = 1 or a length of one token."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0


def dynamic_ntk_scale(factor: Number, ratio: Number) -> Number:
    """The s of transformers' dynamic NTK scaling, α·l'/L - (α-1), from α and l'/L (at least 1)."""
    scale: Number = factor * ratio - (factor - 1)
    return scale
