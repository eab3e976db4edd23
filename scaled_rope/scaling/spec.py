"""The only parser of the text form of a scaling, "[dynamic-]METHOD[:FACTOR][,FIELD=VALUE...]"."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from scaled_rope.errors import ConfigError, unknown
from scaled_rope.scaling.registry import METHODS

_ALIASES = {"none": "default", "unscaled": "default"}
_TRUE_OR_FALSE = ("dynamic", "resonance", "truncate")


@dataclass(frozen=True)
class Spec:
    """The parts of the text form of a scaling. Only the syntax is checked: the method may not exist."""

    method: str
    """The method with its "dynamic-" in front; also "checkpoint", "none" and "unscaled"."""
    factor: str | None = None
    """The text after the colon; None without a colon."""
    fields: tuple[tuple[str, str], ...] = ()
    """(name, value) in the order of the text; the value is empty where there is no equals sign."""
    text: str = field(default="", compare=False, repr=False)
    """The whole text as it was given, for messages."""

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Split a text into its parts."""
        head, *options = [part.strip() for part in text.split(",")]
        method, colon, factor = head.partition(":")
        pairs = [option.partition("=")[::2] for option in options]
        return cls(method, factor if colon else None, tuple(pairs), text)

    def __str__(self) -> str:
        """The text form of these parts."""
        head = self.method if self.factor is None else f"{self.method}:{self.factor}"
        return ",".join([head, *(f"{name}={value}" if value else name for name, value in self.fields)])

    def values(self, known_fields: Iterable[str]) -> dict[str, Any]:
        """The fields of a `RopeScaling` that the text sets, with `method` and `params`.

        known_fields: the fields that a text may set, besides the method's own parameters.

        Raises:
            ConfigError: an unknown method or field, a field that is given twice, a value that is no number.
        """
        dynamic = self.method.startswith("dynamic-") and self.method not in METHODS
        method = self.method.removeprefix("dynamic-") if dynamic else self.method
        method = _ALIASES.get(method, method)
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        row = METHODS[method]
        params = {f.name for f in dataclasses.fields(row.params_type)} if row.params_type else set()
        known = list(known_fields)
        values: dict[str, Any] = {"method": method, "params": {}}
        if dynamic:
            values["dynamic"] = True
        if self.factor is not None:
            values["factor"] = _parse("factor", self.factor)
        given = values.keys() & {"factor", "dynamic"}
        for name, value in self.fields:
            if name in given:
                raise ConfigError(f"scaling {self.text!r}: {name} is given twice")
            given.add(name)
            if name in params:
                values["params"][name] = _parse_param(name, value)
                continue
            if name not in known:
                raise unknown("scaling field", name, [*known, *params])
            values[name] = _parse(name, value)
        takes_factor = "factor" in row.fields and not row.factor_optional and method != "dynamic-ntk"
        if takes_factor and "factor" not in values and not values.get("dynamic"):
            raise ConfigError(f"scaling {self.text!r}: factor is missing; write for example '{method}:8'")
        return values


def rescale(text: str, method: str | None, factor: float | None) -> str:
    """Return the text with another method, without the fields of the old one, or with another factor.

    None keeps the method or the factor.
    """
    spec = Spec.parse(text)
    if method not in (None, spec.method):
        spec = Spec(str(method), spec.factor)
    return str(spec if factor is None else dataclasses.replace(spec, factor=f"{factor:g}"))


def shown(value: Any) -> str:
    """Format a value as briefly as possible, different values differently; a long list by its size and a hash."""
    if isinstance(value, list):
        digest = hashlib.sha256(repr(value).encode()).hexdigest()[:6]
        return f"{len(value)} values {digest}" if len(value) > 4 else "+".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return str(value)


def _parse_param(name: str, text: str) -> Any:
    """Parse a method's own parameter: true, false, a number or a list of numbers. The method checks the type later."""
    try:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        parts = re.split(r"(?<=[^eE+])\+", text)  # not the + of 1e+5
        if len(parts) > 1:
            return [float(part) for part in parts]
        return int(text) if text.strip("+-").isdigit() else float(text)
    except ValueError:
        raise ConfigError(f"{name}={text!r}: must be a number, several as 1+1.5+2, or true or false") from None


def _parse(name: str, text: str) -> Any:
    """Parse the value of a `RopeScaling` field by the field's type."""
    try:
        if name in _TRUE_OR_FALSE:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if name == "original_max_position_embeddings":
            return int(text)
        if name == "attention_temperature":
            return None if text == "none" else text
        return text if name == "ramp" else float(text)
    except (KeyError, ValueError):
        kind = "true or false" if name in _TRUE_OR_FALSE else "a number"
        raise ConfigError(f"{name}={text!r}: must be {kind}") from None
