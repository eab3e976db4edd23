"""Every scaling method as a pure function from the scaling record to frequencies.

D is the number of rotated dimensions of a head, b the base `rope_theta`, L the original context length,
s the scale in effect; equations are those of the YaRN paper (arXiv 2309.00071). All methods are vectorised
over s of any shape [...], so that a batch whose rows have different lengths needs no loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scaled_rope.config import METHODS, Method, RopeScaling, attention_factor_of, ntk_theta
from scaled_rope.errors import ConfigError

if TYPE_CHECKING:
    from scaled_rope.config import MethodFn

__all__ = ["METHODS", "compute_rope", "compute_rope_batch", "register"]

_SCALED = ("factor", "dynamic")
_BY_PARTS = (*_SCALED, "beta_fast", "beta_slow", "ramp", "truncate", "extrapolation_factor")


def register(
    name: str, *, fields: tuple[str, ...], source: str, summary: str, needs_original: bool = False
) -> Callable[[MethodFn], MethodFn]:
    """Add the decorated function to `METHODS`; see `Method` for the columns."""

    def add(fn: MethodFn) -> MethodFn:
        if name in METHODS:
            raise ConfigError(f"method {name!r} is registered twice")
        METHODS[name] = Method(name, fn, frozenset(fields), source, summary, needs_original=needs_original)
        return fn

    return add


@register("default", fields=(), source="eq. 5", summary="unscaled RoPE")
def default(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d = b^(-2d/D)."""
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), torch.ones_like(factor)


@register("linear", fields=_SCALED, source="eq. 10, 12", summary="position interpolation (PI)")
def linear(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / s: dividing every position by s is dividing every frequency."""
    return _powers(scaling.rope_theta, dim, factor) / factor[..., None], torch.ones_like(factor)


@register("ntk", fields=_SCALED, source="eq. 14-16", summary="NTK-aware: a larger base")
def ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """b'^(-2d/D) with b' = b·s^(D/(D-2)): the lowest frequency ends at θ/s, the highest stays."""
    theta = ntk_theta(scaling.rope_theta, factor[..., None], dim)
    return _powers(theta, dim, factor), torch.ones_like(factor)


@register(
    "ntk-by-parts",
    fields=_BY_PARTS,
    needs_original=True,
    source="eq. 17-20; ramp of the released code",
    summary="YaRN's frequencies without its attention factor",
)
def ntk_by_parts(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """(1-γ)·θ_d/s + γ·θ_d, where the kept share γ falls from 1 to 0 as wavelengths grow."""
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    ramp = _rotation_ramp if scaling.ramp == "rotations" else _dimension_ramp
    keep = ramp(scaling, inv_freq, dim)
    if scaling.extrapolation_factor is not None:
        keep = keep * scaling.extrapolation_factor
    # (1-γ)/s + γ, arranged so that s = 1 gives exactly 1.
    return inv_freq * (1 - (1 - keep) * (1 - 1 / factor[..., None])), torch.ones_like(factor)


@register(
    "yarn",
    fields=(*_BY_PARTS, "attention_factor", "mscale"),
    needs_original=True,
    source="eq. 17-22",
    summary="NTK-by-parts and an attention temperature",
)
def yarn(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frequencies of `ntk_by_parts`; attention factor 0.1·mscale·ln(s) + 1, or the given one."""
    inv_freq, _ = ntk_by_parts(scaling, dim, factor, seq_len)
    if scaling.attention_factor is not None:
        return inv_freq, torch.full_like(factor, scaling.attention_factor)
    mscale = 1.0 if scaling.mscale is None else scaling.mscale
    return inv_freq, attention_factor_of(torch.log(factor), mscale)


def _powers(base: float | Tensor, dim: int, like: Tensor) -> Tensor:
    """base^(-2d/D), d = 0 … D/2-1: [D/2], or [..., D/2] for a base [..., 1]; dtype and device of `like`."""
    exponent = torch.arange(0, dim, 2, dtype=like.dtype, device=like.device) / dim
    return base**-exponent


def _dimension_ramp(scaling: RopeScaling, inv_freq: Tensor, dim: int) -> Tensor:
    """Kept share [D/2], linear in the dimension index, as in the released code.

    The ends are the dimensions d(x) = D·ln(L/(2πx)) / (2·ln b) that turn x = beta_fast and beta_slow times
    over L. The upper one is clamped to D-1 although indices end at D/2-1; published models rely on it.
    """
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    low, high = (
        dim
        * math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations))
        / (2 * math.log(scaling.rope_theta))
        for rotations in scaling.ramp_bounds
    )
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    index = torch.arange(dim // 2, dtype=inv_freq.dtype, device=inv_freq.device)
    return 1 - ((index - low) / (high - low)).clamp(0, 1)


def _rotation_ramp(scaling: RopeScaling, inv_freq: Tensor, dim: int) -> Tensor:
    """Kept share γ(r) [D/2], linear in r(d) = L·θ_d/2π, the number of rotations over L (eq. 17-18)."""
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    beta_fast, beta_slow = scaling.ramp_bounds
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    return ((rotations - beta_slow) / (beta_fast - beta_slow)).clamp(0, 1)


def compute_rope(
    scaling: RopeScaling,
    head_dim: int,
    seq_len: float | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, float]:
    """Frequencies and attention factor for one sequence length.

    Args:
        scaling: the record.
        head_dim: dimensions per head; D = int(head_dim · partial_rotary_factor) of them are rotated.
        seq_len: l', the length in tokens of the sequence at hand, for dynamic scaling. None gives s = factor;
            static methods ignore it.
        device: where the result goes; None is the CPU.

    Returns:
        inv_freq, float32 [D/2], radians per position, and the attention factor that multiplies cos and sin.
        Computed in float64 and rounded once.

    Raises:
        ConfigError: odd or non-positive D, a length that is not positive, a method without frequencies.
    """
    length = None
    if seq_len is not None:
        if not 0 < seq_len < math.inf:
            raise ConfigError(f"seq_len={seq_len!r}: must be a positive number of tokens")
        # An explicit device, because models are built under a default device of "meta".
        length = torch.tensor(float(seq_len), dtype=torch.float64, device="cpu")
    factor = torch.tensor(scaling.factor, dtype=torch.float64, device="cpu")
    inv_freq, attention_factor = _compute(scaling, head_dim, factor, length)
    return inv_freq.to(torch.float32).to(device), float(attention_factor)


def compute_rope_batch(scaling: RopeScaling, head_dim: int, seq_len: Tensor) -> tuple[Tensor, Tensor]:
    """`compute_rope` for every row of a batch at once, on the device of `seq_len` and without waiting for it.

    Args:
        seq_len: [B], l' of each row in tokens, any dtype that holds it exactly.

    Returns:
        inv_freq float32 [B, D/2] and attention factor float32 [B]. A row depends on its own length only.
    """
    # Computed in float64 where the device has it (Apple's does not).
    dtype = torch.float32 if seq_len.device.type == "mps" else torch.float64
    length = seq_len.to(dtype)
    inv_freq, attention_factor = _compute(scaling, head_dim, torch.full_like(length, scaling.factor), length)
    return inv_freq.to(torch.float32), attention_factor.to(torch.float32)


def _compute(scaling: RopeScaling, head_dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """The method's function at the scale in effect: s = max(factor, l'/L) when dynamic, else factor."""
    row = METHODS[scaling.method]
    if row.kind != "frequency":
        raise ConfigError(f"method {scaling.method!r} changes attention itself; it has no frequencies")
    dim = scaling.rotary_dim(head_dim)
    if scaling.dynamic and seq_len is not None:
        assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
        factor = torch.maximum(factor, seq_len / scaling.original_max_position_embeddings)
    return row.fn(scaling, dim, factor, seq_len)
