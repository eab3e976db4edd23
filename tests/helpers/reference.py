"""The oracle: every method written slowly from its definition, in float64, one frequency at a time.

Shares no code with the package. D = dim, b = theta, L = original length, s = scale; equations are those of
arXiv 2309.00071. The last frequency of a list is the lowest.
"""

from __future__ import annotations

import math


def unscaled(dim: int, theta: float) -> list[float]:
    """Equation 5."""
    return [theta ** (-2 * d / dim) for d in range(dim // 2)]


def linear(dim: int, theta: float, s: float) -> list[float]:
    """Equations 10 and 12: position m becomes m/s."""
    return [frequency / s for frequency in unscaled(dim, theta)]


def ntk(dim: int, theta: float, s: float) -> list[float]:
    """Equations 14-16."""
    changed_base = theta * s ** (dim / (dim - 2))
    return unscaled(dim, changed_base)


def by_parts_rotations(
    dim: int,
    theta: float,
    s: float,
    original: int,
    beta: float = 32,
    alpha: float = 1,
    extrapolation_factor: float = 1,
) -> list[float]:
    """Equations 17-20, as printed."""
    result = []
    for frequency in unscaled(dim, theta):
        wavelength = 2 * math.pi / frequency
        rotations = original / wavelength
        if rotations < alpha:
            gamma = 0.0
        elif rotations > beta:
            gamma = 1.0
        else:
            gamma = (rotations - alpha) / (beta - alpha)
        gamma *= extrapolation_factor
        result.append((1 - gamma) * frequency / s + gamma * frequency)
    return result


def share_past(d: int, dim: int, theta: float, original: int, begin: float, end: float, truncate: bool = True) -> float:
    """How far the dimension d is on the way from the one that turns `begin` times over L to the one of `end` times."""

    def dimension_that_rotates(times: float) -> float:
        # The d that solves L / (2π·b^(2d/D)) = times.
        return dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(theta))

    first, last = dimension_that_rotates(begin), dimension_that_rotates(end)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    return min(max((d - first) / (last - first), 0.0), 1.0)


def by_parts_dimension(
    dim: int,
    theta: float,
    s: float,
    original: int,
    beta: float = 32,
    alpha: float = 1,
    truncate: bool = True,
    extrapolation_factor: float = 1,
) -> list[float]:
    """The released code: a ramp in the dimension index between d(beta) and d(alpha)."""
    result = []
    for d, frequency in enumerate(unscaled(dim, theta)):
        kept = (1 - share_past(d, dim, theta, original, beta, alpha, truncate)) * extrapolation_factor
        result.append((1 - kept) * frequency / s + kept * frequency)
    return result


def part_ntk(
    dim: int,
    theta: float,
    s: float,
    original: int,
    linear_above: float = 0.75,
    ntk_above: float = 1.25,
    blend_above: float = 2,
    keep_above: float = 16,
    extrapolation_factor: float = 1,
) -> list[float]:
    """The first method of the name NTK-by-parts: NTK-aware towards linear, then unscaled towards the result."""
    result = []
    all_three = zip(unscaled(dim, theta), linear(dim, theta, s), ntk(dim, theta, s), strict=True)
    for d, (plain, interpolated, ntk_aware) in enumerate(all_three):
        to_linear = share_past(d, dim, theta, original, ntk_above, linear_above)
        scaled = (1 - to_linear) * ntk_aware + to_linear * interpolated
        kept = (1 - share_past(d, dim, theta, original, keep_above, blend_above)) * extrapolation_factor
        result.append(kept * plain + (1 - kept) * scaled)
    return result


def llama3(dim: int, theta: float, s: float, original: int, low: float = 1, high: float = 4) -> list[float]:
    """By wavelength: long ones divided by s, short ones kept."""
    result = []
    for frequency in unscaled(dim, theta):
        wavelength = 2 * math.pi / frequency
        if wavelength > original / low:
            result.append(frequency / s)
        elif wavelength < original / high:
            result.append(frequency)
        else:
            share = (original / wavelength - low) / (high - low)
            result.append((1 - share) * frequency / s + share * frequency)
    return result


def longrope(
    dim: int, theta: float, original: int, short: list[float], long: list[float], length: int | None
) -> list[float]:
    """One divisor per frequency; the other list beyond L."""
    divisors = long if length is not None and length > original else short
    return [frequency / divisor for frequency, divisor in zip(unscaled(dim, theta), divisors, strict=True)]


def longrope_attention_factor(s: float, original: int) -> float:
    return math.sqrt(1 + math.log(s) / math.log(original))


def dynamic_ntk(dim: int, theta: float, alpha: float, original: int, length: int | None) -> list[float]:
    """transformers' "dynamic": a base for the length at hand, the model's own up to L."""
    length = original if length is None else max(length, original)
    return unscaled(dim, theta * (alpha * length / original - (alpha - 1)) ** (dim / (dim - 2)))


def ntk_mixed(dim: int, theta: float, s: float, exponent: float = 0.625) -> list[float]:
    """θ_m / exp(a·m^0.625), m from 1."""
    a = math.log(s) / (dim / 2) ** exponent
    return [frequency / math.exp(a * m**exponent) for m, frequency in enumerate(unscaled(dim, theta), start=1)]


def proportional(dim: int, theta: float, s: float, fraction: float = 1) -> list[float]:
    """Only the first `fraction` of the frequencies turn."""
    turning = int(fraction * dim // 2)
    return [frequency if d < turning else 0.0 for d, frequency in enumerate(linear(dim, theta, s))]


def cope(dim: int, theta: float, clip: int) -> list[float]:
    """Clipped RoPE: the `clip` lowest frequencies times half of 1 + cos, from the first one's 0 to the last one's π."""
    result = unscaled(dim, theta)
    for step in range(clip):
        phase = math.pi * step / (clip - 1) if clip > 1 else math.pi
        result[dim // 2 - clip + step] *= (1 + math.cos(phase)) / 2
    return result


def hardclip(dim: int, theta: float, clip: int) -> list[float]:
    """Its baseline: the `clip` lowest frequencies do not turn."""
    return unscaled(dim, theta)[: dim // 2 - clip] + [0.0] * clip


def drope(dim: int) -> list[float]:
    """Nothing turns."""
    return [0.0] * (dim // 2)


def resonance(frequencies: list[float]) -> list[float]:
    """Every wavelength the nearest whole number of tokens, at least one; what does not turn stays so."""
    return [2 * math.pi / max(1, round(2 * math.pi / frequency)) if frequency else 0.0 for frequency in frequencies]


def attention_factor(s: float, mscale: float = 1.0) -> float:
    """Equation 22: sqrt(1/t)."""
    return 0.1 * mscale * math.log(s) + 1.0


def dynamic_scale(length: int, original: int, factor: float = 1.0) -> float:
    """Section 3.3."""
    return max(factor, length / original)


def temperature(kind: str, i: int, original: int, slope: float | None, s: float, window: int | None) -> float:
    """The multiplier of the logits of the query at position i; a slope of None is the default."""
    if kind == "constant":
        return 1 + slope * math.log(s)
    if kind == "log":
        seen = i + 1 if window is None or window > i + 1 else window
        if seen <= original:
            return 1.0
        return math.log(seen) / math.log(original) if slope is None else 1 + slope * math.log(seen / original)
    return 1 + (0.1 if slope is None else slope) * math.log(1 + (i + (kind == "llama4")) // original)
