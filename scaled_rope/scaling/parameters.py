"""Parameters that belong to one method each, as frozen dataclasses that refuse what cannot work."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scaled_rope.errors import ConfigError, is_number, is_positive_whole


@dataclass(frozen=True)
class PartNtkParams:
    """Bounds of the two ramps of `part_ntk`, in rotations over L; the defaults are those of the released code."""

    linear_above: float = 0.75
    """Below this, frequencies are divided by s."""
    ntk_above: float = 1.25
    """Above this, and below `blend_above`, they are NTK-aware."""
    blend_above: float = 2.0
    """Between this and `keep_above`, they go from NTK-aware to kept."""
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


@dataclass(frozen=True)
class Llama3Params:
    """Bounds of the blend of `llama3`, in rotations over L."""

    low_freq_factor: float = 1.0
    """Frequencies with fewer rotations are divided by s."""
    high_freq_factor: float = 4.0
    """Frequencies with more rotations are kept."""

    def __post_init__(self) -> None:
        for name in ("low_freq_factor", "high_freq_factor"):
            _store(self, name, above=0)
        if self.low_freq_factor > self.high_freq_factor:  # Llama 4 has both at 1: a step
            raise ConfigError(
                f"high_freq_factor={self.high_freq_factor:g}: must be at least low_freq_factor={self.low_freq_factor:g}"
            )


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


@dataclass(frozen=True)
class AbfParams:
    theta: float
    """The base in place of the model's."""

    def __post_init__(self) -> None:
        _store(self, "theta", above=1)


@dataclass(frozen=True)
class NtkMixedParams:
    exponent: float = 0.625
    """The exponent of m in exp(a·m^0.625): the larger, the more only the lowest frequencies are divided."""

    def __post_init__(self) -> None:
        _store(self, "exponent", above=0)


@dataclass(frozen=True)
class ProportionalParams:
    fraction: float = 1.0
    """The share of a head's frequencies that turn; the lowest ones stand still."""

    def __post_init__(self) -> None:
        _store(self, "fraction", above=0, at_most=1)


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


def _store(params: object, name: str, above: float, at_most: float = math.inf) -> None:
    """Check a number in a parameter dataclass and store it as float."""
    value = getattr(params, name)
    if not is_number(value) or not above < value <= at_most:
        limit = f" and at most {at_most:g}" if math.isfinite(at_most) else ""
        raise ConfigError(f"{name}={value!r}: must be a finite number above {above:g}{limit}")
    object.__setattr__(params, name, float(value))


@dataclass(frozen=True, kw_only=True)
class ReRopeParams:
    window: int
    """Distance in tokens up to which keys keep their true positions."""
    logn: bool = False
    """Whether queries are multiplied by max(1, ln(i + 1) / ln L)."""

    def __post_init__(self) -> None:
        _whole(self, "window", 1)
        _boolean(self, "logn")


@dataclass(frozen=True, kw_only=True)
class LeakyReRopeParams(ReRopeParams):
    k: float
    """Beyond the window, k tokens count as one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _store(self, "k", above=1, at_most=1e9)


@dataclass(frozen=True)
class SelfExtendParams:
    group: int
    """g: beyond the window, g neighbouring positions count as one."""
    window: int
    """w: distance in tokens below which keys keep their true positions."""

    def __post_init__(self) -> None:
        _whole(self, "group", 2)
        _whole(self, "window", 1)


@dataclass(frozen=True)
class DpeParams:
    groups: list[int]
    """g of each group of pairs of dimensions, from the pairs that turn fastest: beyond the window, g neighbouring
    positions count as one; 1 leaves a group as it is. The pairs are shared out evenly among the groups."""
    window: int
    """w: distance in tokens below which keys keep their true positions."""

    def __post_init__(self) -> None:
        values: Any = self.groups
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise ConfigError(f"groups={values!r}: must be a list with a number for each group of pairs, as 4+4+2+16")
        whole = [int(each) if isinstance(each, float) and each.is_integer() else each for each in values]
        for value in whole:
            if not is_positive_whole(value) or value > 2**53:
                raise ConfigError(f"groups holds {value!r}: must be whole numbers, at least 1")
        if all(value == 1 for value in whole):
            raise ConfigError(f"groups={whole!r}: must hold a number above 1, or all positions stay as they are")
        object.__setattr__(self, "groups", [int(value) for value in whole])
        _whole(self, "window", 1)


@dataclass(frozen=True)
class DualChunkParams:
    chunk: int
    """S: tokens per chunk."""

    def __post_init__(self) -> None:
        _whole(self, "chunk", 1)


def _whole(params: object, name: str, least: int) -> None:
    value = getattr(params, name)
    if not is_positive_whole(value) or value < least or value > 2**53:
        raise ConfigError(f"{name}={value!r}: must be a whole number, at least {least}")
    object.__setattr__(params, name, int(value))


def _boolean(params: object, name: str) -> None:
    if not isinstance(getattr(params, name), bool):
        raise ConfigError(f"{name}={getattr(params, name)!r}: must be true or false")
