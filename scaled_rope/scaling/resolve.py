"""A spec and a checkpoint's own scaling give the scaling that is meant; no torch here."""

from __future__ import annotations

import math
from dataclasses import replace

from scaled_rope.errors import ConfigError
from scaled_rope.scaling.hf_config import primary_type
from scaled_rope.scaling.record import MAX_LENGTH, RopeScaling
from scaled_rope.scaling.spec import Spec


def resolve_scaling(spec: str, own: RopeScaling) -> RopeScaling:
    """Return the scaling that `spec` stands for, given a checkpoint whose own scaling is `own`.

    Beyond `RopeScaling.from_spec`: "checkpoint" is `own`, "checkpoint:FACTOR" is `own` read with another factor, and
    "METHOD:checkpoint" takes over the factor of `own`. A number for YaRN's attention factor goes with the factor.

    Raises:
        ConfigError: not a scaling, or a new factor for a checkpoint that carries none, or one that is for its own
            factor alone.
    """
    parts = Spec.parse(spec)
    if parts.method != "checkpoint":
        if parts.factor == "checkpoint":
            spec = str(replace(parts, factor=repr(own.factor)))
        return RopeScaling.from_spec(spec, own)
    if parts.fields:
        raise ConfigError(f"scaling {spec!r} is not allowed; 'checkpoint' takes a factor only: checkpoint[:FACTOR]")
    if parts.factor is None:
        return own
    if own.method == "default":
        raise ConfigError(f"scaling {spec!r} is not allowed; the checkpoint carries no scaling, name a method")
    try:
        factor = float(parts.factor)
    except ValueError as error:
        raise ConfigError(f"scaling {spec!r} is not allowed; factor {parts.factor!r} is not a number") from error
    return _with_factor(own, factor, spec)


def _with_factor(own: RopeScaling, factor: float, spec: str) -> RopeScaling:
    """A checkpoint's scaling with another factor, which `spec` has asked for.

    YaRN's attention factor A follows its law 1 + c·ln s, whose c is that of A at the old factor.

    Raises:
        ConfigError: numbers that were made for the old factor, and from which those for another do not follow.
    """
    made, known = replace(own, factor=factor), own.attention_factor
    if factor == own.factor:
        return own
    if own.method == "longrope":
        raise ConfigError(
            f"scaling {spec!r} is not allowed; the checkpoint's lists of divisors are for its own factor, "
            f"{own.factor:g}: name another method, or longrope:{factor:g} with lists for it"
        )
    if own.method != "yarn" or known is None or known == 1 or own.dynamic:
        return made
    if own.factor == 1:
        raise ConfigError(
            f"scaling {spec!r} is not allowed; the checkpoint's attention factor, {known:g} at factor 1, does not say "
            f"the one at {factor:g}: name it, as in yarn:{factor:g},attention_factor={known:g}"
        )
    found = 1 + (known - 1) * math.log(factor) / math.log(own.factor)
    if found <= 0:
        raise ConfigError(
            f"scaling {spec!r} is not allowed; the checkpoint's attention factor, {known:g} at factor {own.factor:g}, "
            f"would be {found:g} at {factor:g} by YaRN's law: name it, as in yarn:{factor:g},attention_factor={known:g}"
        )
    return replace(made, attention_factor=found)


def check_spec(text: str) -> None:
    """Raise an error for a text that is no scaling for any model, whatever its own scaling; see `resolve_scaling`.

    Raises:
        ConfigError: an unknown method or field, or a value that is not allowed.
    """
    # Stands for any model: it carries a scaling, and was trained at the longest length, so no window is too long.
    resolve_scaling(text, RopeScaling("yarn", 2.0, original_max_position_embeddings=MAX_LENGTH))


def with_primary(layers: dict[str, RopeScaling], scaling: RopeScaling) -> dict[str, RopeScaling]:
    """Return `layers` with the scaling of the primary type replaced, see `primary_type`.

    An empty dictionary stays empty.
    """
    if not layers:
        return {}
    return {**layers, primary_type(list(layers)): scaling}
