"""Every scaling method as a pure function from the scaling record to frequencies.

D is the number of rotated dimensions of a head, b the base `rope_theta`, L the original context length,
s the scale in effect; equations are those of the YaRN paper (arXiv 2309.00071). All methods are vectorised
over s of any shape [...], so that a batch whose rows have different lengths needs no loop. Methods that
change attention are functions from the record to regions of positions (`scaled_rope.attention.regions`) instead.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from scaled_rope.errors import ConfigError, is_number, shortened
from scaled_rope.scaling.formulas import attention_factor_of, dynamic_ntk_scale, ntk_theta
from scaled_rope.scaling.parameters import (
    ClipParams,
    Llama3Params,
    LongRopeParams,
    PartNtkParams,
)
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS


def default(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d = b^(-2d/D)."""
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), torch.ones_like(factor)


def linear(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / s: dividing every position by s is dividing every frequency."""
    return _powers(scaling.rope_theta, dim, factor) / factor[..., None], torch.ones_like(factor)


def ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """b'^(-2d/D) with b' = b·s^(D/(D-2)): the lowest frequency ends at θ/s, the highest stays."""
    theta = ntk_theta(scaling.rope_theta, factor[..., None], dim)
    return _powers(theta, dim, factor), torch.ones_like(factor)


def ntk_by_parts(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """(1-γ)·θ_d/s + γ·θ_d, where the kept share γ falls from 1 to 0 as wavelengths grow."""
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    if scaling.ramp == "rotations":
        keep = _rotation_ramp(scaling, inv_freq, *scaling.ramp_bounds)
    else:
        keep = _index_ramp(scaling, dim, *scaling.ramp_bounds, inv_freq)
    if scaling.extrapolation_factor is not None:
        keep = keep * scaling.extrapolation_factor
    # (1-γ)/s + γ, arranged so that s = 1 gives exactly 1.
    return inv_freq * (1 - (1 - keep) * (1 - 1 / factor[..., None])), torch.ones_like(factor)


def yarn(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frequencies of `ntk_by_parts`; attention factor 0.1·mscale·ln(s) + 1, or the given one."""
    inv_freq, _ = ntk_by_parts(scaling, dim, factor, seq_len)
    # It multiplies cos and sin, so a score of query and key gets its square: the paper's 1/t.
    if scaling.attention_factor is not None:
        return inv_freq, torch.full_like(factor, scaling.attention_factor)
    mscale = 1.0 if scaling.mscale is None else scaling.mscale
    return inv_freq, attention_factor_of(torch.log(factor), mscale)


def part_ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two ramps in the dimension index: linear to NTK-aware around one rotation, then to unscaled from 2 to 16."""
    params: PartNtkParams = scaling.method_params
    plain = _powers(scaling.rope_theta, dim, factor)
    slow = plain / factor[..., None]
    middle = _powers(ntk_theta(scaling.rope_theta, factor[..., None], dim), dim, factor)
    first = _index_ramp(scaling, dim, params.ntk_above, params.linear_above, plain)
    second = _index_ramp(scaling, dim, params.keep_above, params.blend_above, plain)
    if scaling.extrapolation_factor is not None:
        second = second * scaling.extrapolation_factor
    blended = slow + first * (middle - slow)
    return blended + second * (plain - blended), torch.ones_like(factor)


def llama3(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ/s below `low_freq_factor` rotations over L, θ above `high_freq_factor`, linear in rotations between; a step
    where both are the same."""
    params: Llama3Params = scaling.method_params
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    keep = _rotation_ramp(scaling, inv_freq, params.high_freq_factor, params.low_freq_factor)
    # As in `ntk_by_parts`, for the same reason.
    return inv_freq * (1 - (1 - keep) * (1 - 1 / factor[..., None])), torch.ones_like(factor)


def longrope(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / short_d for sequences up to L, θ_d / long_d for longer ones; attention factor sqrt(1 + ln s / ln L).

    A length that is not known counts as short, as in transformers.
    """
    params: LongRopeParams = scaling.method_params
    if len(params.short_factor) != dim // 2:
        raise ConfigError(
            f"short_factor has {len(params.short_factor)} numbers: must have {dim // 2}, one per frequency of the model"
        )
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    short, long = (
        torch.tensor(values, dtype=factor.dtype, device=factor.device)
        for values in (params.short_factor, params.long_factor)
    )
    # All of a sequence gets the long list as soon as it is longer than L, the tokens before L included.
    divisor = short.expand(*factor.shape, dim // 2)
    if seq_len is not None:
        divisor = torch.where((seq_len > scaling.original_max_position_embeddings)[..., None], long, divisor)
    inv_freq = _powers(scaling.rope_theta, dim, factor) / divisor
    return inv_freq, torch.full_like(factor, scaling.static_attention_factor)


def abf(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """theta^(-2d/D)."""
    inv_freq = _powers(scaling.method_params.theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), torch.ones_like(factor)


def dynamic_ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """NTK-aware at s = α·l'/L - (α-1), α the factor; unscaled up to L. With α = 1 it is the dynamic form of `ntk`."""
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    ratio = torch.ones_like(factor)
    if seq_len is not None:
        ratio = torch.maximum(ratio, seq_len / scaling.original_max_position_embeddings)
    s = dynamic_ntk_scale(factor, ratio)
    return _powers(ntk_theta(scaling.rope_theta, s[..., None], dim), dim, factor), torch.ones_like(factor)


def ntk_mixed(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_m / exp(a·m^0.625) for m = 1 … D/2, with a·(D/2)^0.625 = ln s: the lowest frequency ends at θ/s."""
    plain = _powers(scaling.rope_theta, dim, factor)
    share = torch.arange(1, dim // 2 + 1, dtype=factor.dtype, device=factor.device) / (dim // 2)
    return plain * factor[..., None] ** -(share**scaling.method_params.exponent), torch.ones_like(factor)


def proportional(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / s for the first fraction·D/2 frequencies, 0 for the rest."""
    inv_freq = _powers(scaling.rope_theta, dim, factor) / factor[..., None]
    standing = dim // 2 - _turning(scaling.method_params.fraction, dim)
    return _scale_lowest(inv_freq, _zeros(standing)), torch.ones_like(factor)


def cope(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d · (1 + cos φ)/2 over the lowest frequencies, φ from 0 to π in equal steps; the last one is 0."""
    inv_freq, clip = _clipped(scaling, dim, factor)
    phase = torch.linspace(math.pi, 0, clip, dtype=torch.float64, device="cpu").flip(0)  # flipped: one step gives π
    return _scale_lowest(inv_freq, (1 + phase.cos()) / 2), torch.ones_like(factor)


def hardclip(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d, and 0 for the lowest frequencies."""
    inv_freq, clip = _clipped(scaling, dim, factor)
    return _scale_lowest(inv_freq, _zeros(clip)), torch.ones_like(factor)


def drope(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """0 for all: a model without rotary embedding."""
    return torch.zeros(*factor.shape, dim // 2, dtype=factor.dtype, device=factor.device), torch.ones_like(factor)


def _clipped(scaling: RopeScaling, dim: int, factor: Tensor) -> tuple[Tensor, int]:
    """Unclipped frequencies [..., D/2], and the number of lowest ones to clip."""
    params: ClipParams = scaling.method_params
    # The released code clips 20 of the 64 frequencies of a model with head_dim 128.; the lowest ones, which come last.
    clip = max(1, round(dim / 2 * 20 / 64)) if params.clip is None else params.clip
    if clip > dim // 2:
        raise ConfigError(f"clip={clip}: must be at most {dim // 2}, the number of frequencies")
    inv_freq = _powers(params.theta or scaling.rope_theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), clip


def _scale_lowest(inv_freq: Tensor, weights: Tensor) -> Tensor:
    """inv_freq [..., D/2] with its last len(weights) entries multiplied by `weights`."""
    kept = inv_freq.shape[-1] - len(weights)
    return torch.cat((inv_freq[..., :kept], inv_freq[..., kept:] * weights.to(inv_freq)), dim=-1)


def _turning(fraction: float, dim: int) -> int:
    """The number of frequencies that turn in proportional RoPE, rounded as in transformers."""
    return int(fraction * dim // 2)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device="cpu")  # whatever the default device, see compute_rope


def _round_wavelengths(inv_freq: Tensor) -> Tensor:
    """Resonance RoPE (arXiv 2403.00071): each wavelength becomes the nearest whole number of tokens."""
    # The highest frequency, 1, has a wavelength of 6.28; only divisors below 1, as of LongRoPE, come near the bound.
    wavelength = (2 * math.pi / inv_freq).round().clamp(min=1)
    return torch.where(inv_freq > 0, 2 * math.pi / wavelength, inv_freq)  # a frequency of 0 has no wavelength


def _powers(base: float | Tensor, dim: int, like: Tensor) -> Tensor:
    """base^(-2d/D), d = 0 … D/2-1: [D/2], or [..., D/2] for a base [..., 1]; dtype and device of `like`."""
    exponent = torch.arange(0, dim, 2, dtype=like.dtype, device=like.device) / dim
    return base**-exponent


def _index_ramp(scaling: RopeScaling, dim: int, fast: float, slow: float, like: Tensor) -> Tensor:
    """Kept share [D/2]: 1 up to the dimension that turns `fast` times over L, 0 from the one that turns `slow` times.

    Linear in the dimension index between, as in the released code. The ends d(x) = D·ln(L/(2πx)) / (2·ln b) are
    rounded outwards unless `truncate` is False. The upper one is clamped to D-1 although indices end at D/2-1;
    published models rely on it.
    """
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    low, high = (
        dim
        * math.log(scaling.original_max_position_embeddings / (2 * math.pi * rotations))
        / (2 * math.log(scaling.rope_theta))
        for rotations in (fast, slow)
    )
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as in the released code, against a division by zero
    index = torch.arange(dim // 2, dtype=like.dtype, device=like.device)
    return 1 - ((index - low) / (high - low)).clamp(0, 1)


def _rotation_ramp(scaling: RopeScaling, inv_freq: Tensor, fast: float, slow: float) -> Tensor:
    """Kept share γ(r) [D/2], linear in r(d) = L·θ_d/2π, the number of rotations over L (eq. 17-18)."""
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    if fast == slow:
        return (rotations > fast).to(inv_freq.dtype)  # the limit of the line below, which would divide by zero
    return ((rotations - slow) / (fast - slow)).clamp(0, 1)


# ------------------------------------------------------------------------------------------------- what is computed


def _one_number(value: Any) -> Any:
    """The number in a tensor or an array of one; anything else as it is."""
    return value.item() if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1 else value


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
        seq_len = _one_number(seq_len)
        if not is_number(seq_len) or not 0 < seq_len < math.inf:
            raise ConfigError(f"seq_len={shortened(repr(seq_len), 80)}: must be a positive number of tokens")
        # An explicit device, because models are built under a default device of "meta".
        length = torch.tensor(float(seq_len), dtype=torch.float64, device="cpu")
    factor = torch.tensor(scaling.factor, dtype=torch.float64, device="cpu")
    inv_freq, attention_factor = _compute(scaling, head_dim, factor, length)
    return inv_freq.to(torch.float32).to(device), float(attention_factor)


def rope_values(scaling: RopeScaling, head_dim: int) -> tuple[list[float], float]:
    """The frequencies [D/2] and the attention factor of `compute_rope` as numbers.

    Within a mode of fake tensors, in which models are planned, tensors have no values; these do.
    """
    with unset_fake_temporarily():
        inv_freq, attention_factor = compute_rope(scaling, head_dim)
        return inv_freq.tolist(), attention_factor


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


def compute_scale(scaling: RopeScaling, seq_len: Tensor) -> Tensor:
    """s of rows with l' = seq_len [...] tokens, in seq_len's dtype if that is floating, else in float64.

    max(factor, l'/L) under dynamic scaling; with `dynamic_step`, factor·stepᵏ with the least k >= 0 that reaches l'/L;
    otherwise the factor.
    """
    dtype = torch.float32 if seq_len.device.type == "mps" else torch.float64
    length = seq_len if seq_len.is_floating_point() else seq_len.to(dtype)
    factor = torch.full_like(length, scaling.factor)
    if not scaling.dynamic:
        return factor
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    ratio = length / scaling.original_max_position_embeddings
    if scaling.dynamic_step is None:
        return torch.maximum(factor, ratio)
    step = scaling.dynamic_step
    k = (torch.log(ratio / factor) / math.log(step)).ceil().clamp(min=0)
    # A logarithm that is off by its last bit must not move a length that a step covers exactly to another one.
    k = torch.where((k > 0) & (factor * step ** (k - 1) >= ratio), k - 1, k)
    k = torch.where(factor * step**k < ratio, k + 1, k)
    return factor * step**k


def _compute(scaling: RopeScaling, head_dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """Call the method's function at the scale in effect: `compute_scale` if dynamic and seq_len is given, else factor.

    factor, seq_len, shapes and results: as `registry.MethodFn`.
    """
    row = METHODS[scaling.method]
    if row.kind != "frequency":
        raise ConfigError(f"method {scaling.method!r} changes attention itself; it has no frequencies")
    dim = scaling.rotary_dim(head_dim)
    # Before the method, which is given the scale in effect and doesn't know of dynamic scaling.
    if scaling.dynamic and seq_len is not None:
        factor = compute_scale(scaling, seq_len)
    inv_freq, attention_factor = row.fn(scaling, dim, factor, seq_len)
    if scaling.turning_fraction != 1.0:
        inv_freq = _scale_lowest(inv_freq, _zeros(dim // 2 - _turning(scaling.turning_fraction, dim)))
    # After the method: it is the scaled wavelengths that become whole.
    return (_round_wavelengths(inv_freq) if scaling.resonance else inv_freq), attention_factor


def at_length(scaling: RopeScaling, seq_len: int) -> RopeScaling:
    """Return a scaling whose frequencies at every length are those of `scaling` for `seq_len` tokens.

    A scaling that does not depend on the length is returned unchanged.
    """
    if not scaling.is_length_dependent:
        return scaling
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    ratio = max(1.0, seq_len / scaling.original_max_position_embeddings)
    if scaling.method == "dynamic-ntk":
        return replace(scaling, method="ntk", factor=dynamic_ntk_scale(scaling.factor, ratio))
    if scaling.method == "longrope":
        used = scaling.params["long_factor" if ratio > 1 else "short_factor"]
        return replace(scaling, params={"short_factor": used, "long_factor": used})
    scale = float(compute_scale(scaling, torch.tensor(float(seq_len), dtype=torch.float64, device="cpu")))
    if scale == 1 and scaling.attention_temperature == "constant":  # 1 + slope·ln 1, whatever the slope
        scaling = replace(scaling, temperature_slope=0.0)
    return replace(scaling, dynamic=False, dynamic_step=None, factor=scale)
