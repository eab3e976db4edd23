"""The scalings that a server may compute instead of its own: known faults, and other readings of a config.

A hypothesis is a scaling, with a window if attention may be cut off. Two that compute the same numbers are one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scaled_rope.errors import ConfigError, is_positive_whole
from scaled_rope.scaling.formulas import attention_factor_of
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.hf_config import text_path
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.serving.targets.arithmetic import powers
from scaled_rope.serving.targets.common import STILL

_OLD_THETA = 10000.0
"""The base that programs take where they find none."""
_ROUNDED = " with frequencies rounded to bfloat16"
_SAME = 1e-6
"""Relative difference below which frequencies and attention factors count as the same: float32 rounding is 1e-7."""


@dataclass(frozen=True)
class Hypothesis:
    """One thing that the server may compute."""

    name: str
    """As the object of "serves", for example "yarn x8 without the attention factor"."""
    scaling: RopeScaling
    window: int | None = None
    """Tokens that attention sees in every layer; None: as the model has it."""
    claimed: bool = False
    also: tuple[str, ...] = ()
    """Other names of the same numbers."""
    minor: bool = False
    """Whether it is hardly an error, so that a server in a short dtype need not be told apart from it."""


def hypotheses(
    claim: RopeScaling,
    head_dim: int,
    length: int,
    raw: Mapping[str, Any] | None = None,
    more: Mapping[str, RopeScaling] | None = None,
) -> list[Hypothesis]:
    """The claim and all that a server may run instead, without doubles; the claim comes first.

    Args:
        claim: the scaling that the server is to run.
        head_dim: dimensions per head of the model.
        length: the longest sequence in tokens that the scaling is for.
        raw: the config.json of the model, for other readings of it.
        more: further scalings by name, for example that of the checkpoint before it was extended.

    Raises:
        ConfigError: a claim that changes attention itself or has a temperature, which no server has.
    """
    if claim.beyond_tables:
        raise ConfigError(f"scaling {claim.label!r} {claim.beyond_tables}, which no server computes")
    found = [Hypothesis(claim.label, claim, claimed=True)]
    numbers = [_numbers(claim, head_dim, length)]
    for name, scaling in _candidates(claim, head_dim, length, raw or {}, more or {}):
        try:
            own = _numbers(scaling, head_dim, length)
        except ConfigError:
            continue  # no table of these values, so nobody can run it
        same = next((at for at, other in enumerate(numbers) if _equal(own, other)), None)
        if same is None:
            found.append(Hypothesis(name, scaling, minor=name.endswith(_ROUNDED)))
            numbers.append(own)
        elif same and name not in (found[same].name, *found[same].also):
            found[same] = replace(found[same], also=(*found[same].also, name))
    found += [Hypothesis(f"{claim.label} with a window of {window} tokens in all layers", claim, window)
              for window in _windows(claim, raw or {})]  # fmt: skip
    return found


def _numbers(scaling: RopeScaling, head_dim: int, length: int) -> list[tuple[list[float], float]]:
    """Frequencies and attention factor at the lengths where they may differ."""
    original = int(scaling.original_max_position_embeddings or length)
    lengths = sorted({min(original, length), length}) if scaling.is_length_dependent else [length]
    rows = []
    for at in lengths:
        inv_freq, factor = compute_rope(scaling, head_dim, at)
        rows.append((inv_freq.tolist(), float(factor)))
    return rows if len(rows) == 2 else rows * 2


def _equal(one: list[tuple[list[float], float]], other: list[tuple[list[float], float]]) -> bool:
    return all(
        len(a) == len(b)
        and math.isclose(first, second, rel_tol=_SAME)
        and all(math.isclose(x, y, rel_tol=_SAME, abs_tol=1e-12) for x, y in zip(a, b, strict=True))
        for (a, first), (b, second) in zip(one, other, strict=True)
    )


def _plain(claim: RopeScaling, theta: float) -> RopeScaling:
    """The unscaled model, with this base."""
    return replace(RopeScaling.from_spec("default", claim), rope_theta=theta)


def _candidates(
    claim: RopeScaling, head_dim: int, length: int, raw: Mapping[str, Any], more: Mapping[str, RopeScaling]
) -> Iterator[tuple[str, RopeScaling]]:
    """Names and scalings, the likeliest faults first; some equal the claim or each other."""
    label, fields = claim.label, METHODS[claim.method].fields
    theta, factor = claim.rope_theta, claim.factor
    yield "this model unscaled", _plain(claim, theta)
    yield f"this model unscaled, with rope_theta={_OLD_THETA:g}", _plain(claim, _OLD_THETA)
    yield f"{label} with rope_theta={_OLD_THETA:g}", replace(claim, rope_theta=_OLD_THETA)
    if (plain := _plain(claim, theta)).turning_fraction != 1:  # who drops `proportional` turns the others too
        yield "this model unscaled, with every frequency turning", replace(plain, turning_fraction=1.0)
    yield from more.items()
    whole = claim.static_attention_factor
    if "attention_factor" in fields:
        yield f"{label} without the attention factor", replace(claim, attention_factor=1.0, mscale=None)
        yield f"{label} with the attention factor twice", _with_factor(claim, whole * whole)
        if claim.method == "yarn":
            usual = attention_factor_of(math.log(factor), 1.0)
            yield f"{label} with 0.1·ln(s) + 1 for the attention factor", _with_factor(claim, usual)
            yield f"{label} with the attention factor times 0.1·ln(s) + 1", _with_factor(claim, whole * usual)
            bare = _with_factor(replace(claim, beta_fast=None, beta_slow=None), usual)
            yield f"{label} with YaRN's default constants", bare  # llama.cpp, of all that a converted GGUF says
    elif claim.method == "ntk-by-parts":  # written as yarn with attention factor 1
        usual = attention_factor_of(math.log(factor), 1.0)
        values = claim.to_dict() | {"method": "yarn", "attention_factor": usual}
        yield f"{label} with YaRN's attention factor", RopeScaling.from_dict(values)
    if "beta_fast" in fields and (claim.beta_fast is not None or claim.beta_slow is not None):
        yield f"{label} with beta_fast=32, beta_slow=1", replace(claim, beta_fast=None, beta_slow=None)
    if "truncate" in fields and claim.truncate is False:
        yield f"{label} with truncate=true", replace(claim, truncate=None)
    if "extrapolation_factor" in fields and claim.extrapolation_factor not in (None, 1.0):
        yield f"{label} with extrapolation_factor=1", replace(claim, extrapolation_factor=None)
    if claim.ramp == "rotations":
        yield f"{label} with ramp=dimension", replace(claim, ramp=None)
    if claim.resonance:
        yield f"{label} without resonance", replace(claim, resonance=False)
    if factor > 1 and "factor" in fields and claim.method != "longrope":
        yield f"{label} with the factor applied twice (x{factor * factor:g})", replace(claim, factor=factor * factor)
    original = claim.original_max_position_embeddings
    if original is not None and METHODS[claim.method].needs_original:
        for other in _other_originals(original, factor, raw):
            text = f"{label} with L = {other} instead of {original}"
            yield text, replace(claim, original_max_position_embeddings=other)
    if factor > 1 and not claim.dynamic:
        for method in ("linear", "ntk", "ntk-by-parts", "yarn"):
            if method != claim.method and (original is not None or not METHODS[method].needs_original):
                other_scaling = RopeScaling.from_spec(f"{method}:{factor!r}", claim)
                yield other_scaling.label, other_scaling
    if claim.is_length_dependent and not claim.dynamic and claim.method == "longrope":
        params = claim.params
        for kept in ("short", "long"):
            both = {f"{part}_factor": params[f"{kept}_factor"] for part in ("short", "long")}
            yield f"{label} with the {kept} list at every length", replace(claim, params={**params, **both})
    if not claim.is_length_dependent:
        rounded = spelled_out(claim, head_dim, length, lambda table: table.to(torch.bfloat16).double())
        yield f"{label}{_ROUNDED}", rounded


def _with_factor(claim: RopeScaling, factor: float) -> RopeScaling:
    return replace(claim, attention_factor=factor, mscale=None)


def _other_originals(original: int, factor: float, raw: Mapping[str, Any]) -> list[int]:
    """Lengths that a program may take for L."""
    text: Any = raw
    for name in text_path(raw) if raw else ():
        text = text.get(name, {}) if isinstance(text, Mapping) else {}
    written = text.get("max_position_embeddings") if isinstance(text, Mapping) else None
    lengths = [written, int(original * factor), 2 * original, original // 2]
    return [
        int(one) for one in dict.fromkeys(lengths) if one is not None and is_positive_whole(one) and one != original
    ]


def spelled_out(claim: RopeScaling, head_dim: int, length: int, change: Callable[[Tensor], Tensor]) -> RopeScaling:
    """The table of a scaling for sequences of `length` tokens, changed and spelled out as LongRoPE for all lengths.

    change: float64 frequencies [D/2] -> those to spell out.
    """
    inv_freq, factor = compute_rope(claim, head_dim, length)
    changed = change(inv_freq.double()).tolist()
    own = powers(claim.rope_theta, claim.rotary_dim(head_dim))
    table = [a / b if b > 0 else STILL for a, b in zip(own, changed, strict=True)]
    return RopeScaling(
        "longrope",
        attention_factor=float(factor),
        original_max_position_embeddings=claim.original_max_position_embeddings or length,
        rope_theta=claim.rope_theta,
        partial_rotary_factor=claim.partial_rotary_factor,
        params={"short_factor": table, "long_factor": table},
    )


def _windows(claim: RopeScaling, raw: Mapping[str, Any]) -> list[int]:
    """Windows that a server may put on all layers: that of the config, or the trained length."""
    text: Any = raw
    for name in text_path(raw) if raw else ():
        text = text.get(name, {}) if isinstance(text, Mapping) else {}
    written = text.get("sliding_window") if isinstance(text, Mapping) else None
    lengths = [written, claim.original_max_position_embeddings]
    return [int(one) for one in dict.fromkeys(lengths) if one is not None and is_positive_whole(one)]
