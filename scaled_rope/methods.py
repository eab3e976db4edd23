"""Every scaling method as a pure function from the scaling record to frequencies.

D is the number of rotated dimensions of a head, b the base `rope_theta`, L the original context length,
s the scale in effect; equations are those of the YaRN paper (arXiv 2309.00071). All methods are vectorised
over s of any shape [...], so that a batch whose rows have different lengths needs no loop. Methods that
change attention are functions from the record to regions of positions (`scaled_rope.attention.regions`) instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scaled_rope.attention import regions
from scaled_rope.attention.regions import Regions
from scaled_rope.config import METHODS, Method, RopeScaling
from scaled_rope.dialects import is_number, is_positive_whole
from scaled_rope.errors import ConfigError
from scaled_rope.formulas import attention_factor_of, dynamic_ntk_scale, ntk_theta

if TYPE_CHECKING:
    from scaled_rope.config import MethodFn

__all__ = ["METHODS", "attention_regions", "compute_rope", "compute_rope_batch", "compute_scale", "register"]

_SCALED = ("factor", "dynamic")
_BY_PARTS = (*_SCALED, "beta_fast", "beta_slow", "ramp", "truncate", "extrapolation_factor")


def register(
    name: str, *, fields: tuple[str, ...], source: str, summary: str, **columns: Any
) -> Callable[[MethodFn], MethodFn]:
    """Add the decorated function to `METHODS`; see `Method` for the columns."""

    def add(fn: MethodFn) -> MethodFn:
        if name in METHODS:
            raise ConfigError(f"method {name!r} is registered twice")
        METHODS[name] = Method(name, fn, frozenset(fields), source, summary, **columns)
        return fn

    return add


@register(
    "default", fields=(), no_dynamic="it has no scale", source="RoFormer, arXiv 2104.09864", summary="unscaled RoPE"
)
def default(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d = b^(-2d/D)."""
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), torch.ones_like(factor)


@register("linear", fields=_SCALED, source="arXiv 2306.15595; YaRN eq. 10, 12", summary="position interpolation (PI)")
def linear(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / s: dividing every position by s is dividing every frequency."""
    return _powers(scaling.rope_theta, dim, factor) / factor[..., None], torch.ones_like(factor)


@register("ntk", fields=_SCALED, source="arXiv 2309.00071 (YaRN), eq. 14-16", summary="NTK-aware: a larger base")
def ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """b'^(-2d/D) with b' = b·s^(D/(D-2)): the lowest frequency ends at θ/s, the highest stays."""
    theta = ntk_theta(scaling.rope_theta, factor[..., None], dim)
    return _powers(theta, dim, factor), torch.ones_like(factor)


@register(
    "ntk-by-parts",
    fields=_BY_PARTS,
    needs_original=True,
    source="arXiv 2309.00071 (YaRN), eq. 17-20",
    summary="YaRN's frequencies without its attention factor",
)
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


@register(
    "yarn",
    fields=(*_BY_PARTS, "attention_factor", "mscale"),
    needs_original=True,
    source="arXiv 2309.00071 (YaRN), eq. 17-22",
    summary="NTK-by-parts and an attention temperature",
)
def yarn(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """The frequencies of `ntk_by_parts`; attention factor 0.1·mscale·ln(s) + 1, or the given one."""
    inv_freq, _ = ntk_by_parts(scaling, dim, factor, seq_len)
    if scaling.attention_factor is not None:
        return inv_freq, torch.full_like(factor, scaling.attention_factor)
    mscale = 1.0 if scaling.mscale is None else scaling.mscale
    return inv_freq, attention_factor_of(torch.log(factor), mscale)


@dataclass(frozen=True)
class PartNtkParams:
    """Rotations over L between which the older blend works; the released code has them built in."""

    linear_above: float = 0.75
    """Below this, frequencies are divided by s."""
    ntk_above: float = 1.25
    """Above this, and below `blend_above`, they are NTK-aware."""
    blend_above: float = 2.0
    keep_above: float = 16.0
    """Above this, they are kept."""

    def __post_init__(self) -> None:
        for name in ("linear_above", "ntk_above", "blend_above", "keep_above"):
            _store(self, name, above=0)
        if self.linear_above >= self.ntk_above or self.blend_above >= self.keep_above:
            raise ConfigError(
                f"linear_above={self.linear_above:g} must be below ntk_above={self.ntk_above:g}, and "
                f"blend_above={self.blend_above:g} below keep_above={self.keep_above:g}"
            )


@register(
    "part-ntk",
    fields=(*_SCALED, "extrapolation_factor"),
    params_type=PartNtkParams,
    needs_original=True,
    source="first NTK-by-parts, github.com/jquesnelle/yarn",
    summary="θ/s for long waves, NTK-aware for middle, θ for short",
)
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


@dataclass(frozen=True)
class Llama3Params:
    """Where the blend of `llama3` begins and ends, in rotations over L."""

    low_freq_factor: float = 1.0
    """Fewer rotations: divided by s."""
    high_freq_factor: float = 4.0
    """More: kept."""

    def __post_init__(self) -> None:
        for name in ("low_freq_factor", "high_freq_factor"):
            _store(self, name, above=0)
        if self.low_freq_factor > self.high_freq_factor:  # Llama 4 has both at 1: a step
            raise ConfigError(
                f"high_freq_factor={self.high_freq_factor:g}: must be at least low_freq_factor={self.low_freq_factor:g}"
            )


@register(
    "llama3",
    fields=_SCALED,
    params_type=Llama3Params,
    needs_original=True,
    source="Llama 3.1, arXiv 2407.21783",
    summary="a ramp in rotations from 1 to 4, no attention factor",
)
def llama3(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ/s below `low_freq_factor` rotations over L, θ above `high_freq_factor`, linear in rotations between; a step
    where both are the same."""
    params: Llama3Params = scaling.method_params
    inv_freq = _powers(scaling.rope_theta, dim, factor)
    keep = _rotation_ramp(scaling, inv_freq, params.high_freq_factor, params.low_freq_factor)
    return inv_freq * (1 - (1 - keep) * (1 - 1 / factor[..., None])), torch.ones_like(factor)


@dataclass(frozen=True)
class LongRopeParams:
    """One divisor per frequency [D/2], for sequences up to L and for longer ones."""

    short_factor: list[float]
    long_factor: list[float]

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not values:
                raise ConfigError(f"{name}={values!r}: must be a list with one number per frequency")
            for value in values:
                if not is_number(value) or value <= 0:
                    raise ConfigError(f"{name} holds {value!r}: must be positive finite numbers")
            object.__setattr__(self, name, [float(value) for value in values])
        if len(self.short_factor) != len(self.long_factor):
            raise ConfigError(
                f"long_factor has {len(self.long_factor)} numbers: must have as many as short_factor, "
                f"{len(self.short_factor)}"
            )


@register(
    "longrope",
    fields=("factor", "attention_factor"),
    params_type=LongRopeParams,
    needs_original=True,
    length_dependent=True,
    no_dynamic="its frequencies switch at L already",
    source="LongRoPE, arXiv 2402.13753, as in transformers",
    summary="a divisor per frequency, one list up to L, one beyond",
)
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
    divisor = short.expand(*factor.shape, dim // 2)
    if seq_len is not None:
        divisor = torch.where((seq_len > scaling.original_max_position_embeddings)[..., None], long, divisor)
    inv_freq = _powers(scaling.rope_theta, dim, factor) / divisor
    return inv_freq, torch.full_like(factor, scaling.static_attention_factor)


@dataclass(frozen=True)
class AbfParams:
    theta: float
    """The base in place of the model's."""

    def __post_init__(self) -> None:
        _store(self, "theta", above=1)


@register(
    "abf",
    fields=("factor",),
    params_type=AbfParams,
    factor_optional=True,
    no_dynamic="its base does not depend on s",
    source="adjusted base frequency, arXiv 2309.16039",
    summary="another base, chosen by hand",
)
def abf(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """theta^(-2d/D)."""
    inv_freq = _powers(scaling.method_params.theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), torch.ones_like(factor)


@register(
    "dynamic-ntk",
    fields=("factor",),
    needs_original=True,
    length_dependent=True,
    no_dynamic="it is one already",
    source="'dynamic', github.com/huggingface/transformers",
    summary="a base that grows with the length, s = α·l'/L - (α-1)",
)
def dynamic_ntk(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """NTK-aware at s = α·l'/L - (α-1), α the factor; unscaled up to L. With α = 1 it is the dynamic form of `ntk`."""
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    ratio = torch.ones_like(factor)
    if seq_len is not None:
        ratio = torch.maximum(ratio, seq_len / scaling.original_max_position_embeddings)
    s = dynamic_ntk_scale(factor, ratio)
    return _powers(ntk_theta(scaling.rope_theta, s[..., None], dim), dim, factor), torch.ones_like(factor)


@dataclass(frozen=True)
class NtkMixedParams:
    exponent: float = 0.625
    """How fast the division sets in towards low frequencies."""

    def __post_init__(self) -> None:
        _store(self, "exponent", above=0)


@register(
    "ntk-mixed",
    fields=_SCALED,
    params_type=NtkMixedParams,
    source="NTK-RoPE-mixed (Su), kexue.fm/archives/9706",
    summary="θ_m / exp(a·m^0.625): a smooth change from θ to θ/s",
)
def ntk_mixed(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_m / exp(a·m^0.625) for m = 1 … D/2, with a·(D/2)^0.625 = ln s: the lowest frequency ends at θ/s."""
    plain = _powers(scaling.rope_theta, dim, factor)
    share = torch.arange(1, dim // 2 + 1, dtype=factor.dtype, device=factor.device) / (dim // 2)
    return plain * factor[..., None] ** -(share**scaling.method_params.exponent), torch.ones_like(factor)


@dataclass(frozen=True)
class ProportionalParams:
    fraction: float = 1.0
    """The share of a head's frequencies that turn; the lowest ones stand still."""

    def __post_init__(self) -> None:
        _store(self, "fraction", above=0, at_most=1)


@register(
    "proportional",
    fields=_SCALED,
    params_type=ProportionalParams,
    factor_optional=True,
    source="p-RoPE, arXiv 2410.06205, as in transformers",
    summary="the lowest frequencies 0, the others divided by s",
)
def proportional(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d / s for the first fraction·D/2 frequencies, 0 for the rest."""
    turning = int(scaling.method_params.fraction * dim // 2)
    inv_freq = _powers(scaling.rope_theta, dim, factor) / factor[..., None]
    return _scale_lowest(inv_freq, _zeros(dim // 2 - turning)), torch.ones_like(factor)


@dataclass(frozen=True)
class ClipParams:
    clip: int | None = None
    """How many of the lowest frequencies are clipped. Default: 5 of 16, the released 20 of 64."""
    theta: float | None = None
    """A base in place of the model's, as in `abf`."""

    def __post_init__(self) -> None:
        if self.clip is not None and not is_positive_whole(self.clip):
            raise ConfigError(f"clip={self.clip!r}: must be a whole number, at least 1")
        if self.clip is not None:
            object.__setattr__(self, "clip", int(self.clip))
        if self.theta is not None:
            _store(self, "theta", above=1)


_CLIPPED: dict[str, Any] = {
    "fields": ("factor",),
    "params_type": ClipParams,
    "factor_optional": True,
    "no_dynamic": "what it clips does not depend on s",
}


@register(
    "cope",
    source="Clipped RoPE, arXiv 2602.05258",
    summary="the lowest frequencies tapered to 0 by a cosine",
    **_CLIPPED,
)
def cope(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d · (1 + cos φ)/2 over the lowest frequencies, φ from 0 to π in equal steps; the last one is 0."""
    inv_freq, clip = _clipped(scaling, dim, factor)
    phase = torch.linspace(math.pi, 0, clip, dtype=torch.float64, device="cpu").flip(0)  # of one step, it is π
    return _scale_lowest(inv_freq, (1 + phase.cos()) / 2), torch.ones_like(factor)


@register(
    "hardclip",
    source="the baseline of Clipped RoPE, arXiv 2602.05258",
    summary="the lowest frequencies set to 0",
    **_CLIPPED,
)
def hardclip(scaling: RopeScaling, dim: int, factor: Tensor, seq_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """θ_d, and 0 for the lowest frequencies."""
    inv_freq, clip = _clipped(scaling, dim, factor)
    return _scale_lowest(inv_freq, _zeros(clip)), torch.ones_like(factor)


def _clipped(scaling: RopeScaling, dim: int, factor: Tensor) -> tuple[Tensor, int]:
    """Unclipped frequencies [..., D/2] and how many of them are to be clipped."""
    params: ClipParams = scaling.method_params
    clip = max(1, round(dim / 2 * 20 / 64)) if params.clip is None else params.clip
    if clip > dim // 2:
        raise ConfigError(f"clip={clip}: must be at most {dim // 2}, the number of frequencies")
    inv_freq = _powers(params.theta or scaling.rope_theta, dim, factor)
    return inv_freq.expand(*factor.shape, dim // 2), clip


def _scale_lowest(inv_freq: Tensor, weights: Tensor) -> Tensor:
    """inv_freq [..., D/2] with its last len(weights) entries multiplied by `weights`."""
    kept = inv_freq.shape[-1] - len(weights)
    return torch.cat((inv_freq[..., :kept], inv_freq[..., kept:] * weights.to(inv_freq)), dim=-1)


def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.float64, device="cpu")  # whatever the default device, see compute_rope


def _round_wavelengths(inv_freq: Tensor) -> Tensor:
    """Resonance RoPE (arXiv 2403.00071): each wavelength becomes the nearest whole number of tokens."""
    wavelength = (2 * math.pi / inv_freq).round().clamp(min=1)
    return torch.where(inv_freq > 0, 2 * math.pi / wavelength, inv_freq)


def _store(params: object, name: str, above: float, at_most: float = math.inf) -> None:
    """Check a number of a parameter dataclass and store it as float."""
    value = getattr(params, name)
    if not is_number(value) or not above < value <= at_most:
        limit = f" and at most {at_most:g}" if math.isfinite(at_most) else ""
        raise ConfigError(f"{name}={value!r}: must be a finite number above {above:g}{limit}")
    object.__setattr__(params, name, float(value))


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
        high += 0.001
    index = torch.arange(dim // 2, dtype=like.dtype, device=like.device)
    return 1 - ((index - low) / (high - low)).clamp(0, 1)


def _rotation_ramp(scaling: RopeScaling, inv_freq: Tensor, fast: float, slow: float) -> Tensor:
    """Kept share γ(r) [D/2], linear in r(d) = L·θ_d/2π, the number of rotations over L (eq. 17-18)."""
    assert scaling.original_max_position_embeddings is not None  # validated by RopeScaling
    rotations = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    if fast == slow:
        return (rotations > fast).to(inv_freq.dtype)
    return ((rotations - slow) / (fast - slow)).clamp(0, 1)


# ------------------------------------------------------------------------------------- methods that change attention


_ATTENTION: dict[str, Any] = {
    "kind": "attention",
    "fields": ("factor",),
    "factor_optional": True,
    "needs_original": True,
    "no_dynamic": "it has no scale",
}


@dataclass(frozen=True, kw_only=True)
class ReRopeParams:
    window: int
    """Distance, in tokens, up to which keys are seen where they are."""
    logn: bool = False
    """Whether queries are multiplied by max(1, ln(i + 1) / ln L)."""

    def __post_init__(self) -> None:
        _whole(self, "window", 1)
        _boolean(self, "logn")


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


@dataclass(frozen=True, kw_only=True)
class LeakyReRopeParams(ReRopeParams):
    k: float
    """Beyond the window, k tokens count as one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _store(self, "k", above=1)


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


@dataclass(frozen=True)
class SelfExtendParams:
    group: int
    """g: beyond the window, g neighbouring positions count as one."""
    window: int
    """w: distance, in tokens, below which keys are seen where they are."""

    def __post_init__(self) -> None:
        _whole(self, "group", 2)
        _whole(self, "window", 1)


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


@dataclass(frozen=True)
class DualChunkParams:
    chunk: int
    """S: tokens per chunk."""

    def __post_init__(self) -> None:
        _whole(self, "chunk", 1)


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


def _whole(params: object, name: str, least: int) -> None:
    value = getattr(params, name)
    if not is_positive_whole(value) or value < least or value > 2**53:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {least}")
    object.__setattr__(params, name, int(value))


def _boolean(params: object, name: str) -> None:
    if not isinstance(getattr(params, name), bool):
        raise ConfigError(f"{name}={getattr(params, name)!r}: must be true or false")


# ------------------------------------------------------------------------------------------------- what is computed


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
    """The method's function at the scale in effect: that of `compute_scale` when a length is given, else factor."""
    row = METHODS[scaling.method]
    if row.kind != "frequency":
        raise ConfigError(f"method {scaling.method!r} changes attention itself; it has no frequencies")
    dim = scaling.rotary_dim(head_dim)
    if scaling.dynamic and seq_len is not None:
        factor = compute_scale(scaling, seq_len)
    inv_freq, attention_factor = row.fn(scaling, dim, factor, seq_len)
    return (_round_wavelengths(inv_freq) if scaling.resonance else inv_freq), attention_factor
