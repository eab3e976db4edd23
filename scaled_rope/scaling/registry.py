"""The registry of methods: names, fields, parameters and sources. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from scaled_rope.errors import ConfigError

MethodFn = Callable[..., Any]


@dataclass(frozen=True)
class Method:
    """One row of the registry `METHODS`: a scaling method and what it needs."""

    name: str
    fn: MethodFn
    """(scaling, dim, factor [...], seq_len [...] | None) -> (inv_freq [..., dim/2], attention [...]); of methods that
    change attention: (scaling) -> `scaled_rope.attention.regions.Regions`."""
    fields: frozenset[str]
    """The optional fields of `RopeScaling` that the method takes; any other one that is set is an error."""
    source: str
    """Where the formula is from: a paper's arXiv number, or an address."""
    summary: str
    """One line for tables and error messages."""
    params_type: type | None = None
    """A frozen dataclass that `RopeScaling.params` must fit, or None when the method has no parameters."""
    kind: Literal["frequency", "attention"] = "frequency"
    """"attention" methods change attention itself and have no table of frequencies."""
    length_dependent: bool = False
    """Whether frequencies depend on the sequence length even without `dynamic`."""
    needs_original: bool = False
    """Whether the formula contains L, that is `original_max_position_embeddings`."""
    factor_optional: bool = False
    """Whether a spec may leave the factor out: it only says for which length the scaling is meant, or is often 1."""
    no_dynamic: str = ""
    """Why the method has no dynamic form; empty when it has one."""


METHODS: dict[str, Method] = {}
"""Every method by name. Filled by the `@register` decorators of `scaled_rope.scaling.frequencies`."""


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
