"""The oracle: every method written slowly from the paper's equations, in float64, one frequency at a time.

Shares no code with the package. D = dim, b = theta, L = original length, s = scale (arXiv 2309.00071).
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
    dim: int, theta: float, s: float, original: int, beta: float = 32, alpha: float = 1
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
        result.append((1 - gamma) * frequency / s + gamma * frequency)
    return result


def by_parts_dimension(
    dim: int, theta: float, s: float, original: int, beta: float = 32, alpha: float = 1, truncate: bool = True
) -> list[float]:
    """What the released code does: a ramp in the dimension index between d(beta) and d(alpha)."""

    def dimension_that_rotates(times: float) -> float:
        # The d that solves L / (2π·b^(2d/D)) = times.
        return dim * math.log(original / (2 * math.pi * times)) / (2 * math.log(theta))

    first, last = dimension_that_rotates(beta), dimension_that_rotates(alpha)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    if first == last:
        last += 0.001
    result = []
    for d, frequency in enumerate(unscaled(dim, theta)):
        interpolated = min(max((d - first) / (last - first), 0.0), 1.0)
        result.append(interpolated * frequency / s + (1 - interpolated) * frequency)
    return result


def attention_factor(s: float, mscale: float = 1.0) -> float:
    """Equation 22: sqrt(1/t)."""
    return 0.1 * mscale * math.log(s) + 1.0


def dynamic_scale(length: int, original: int, factor: float = 1.0) -> float:
    """Section 3.3."""
    return max(factor, length / original)
