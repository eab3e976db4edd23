"""One row per scaling method: its name, fields, parameters, source, and the function that computes it.

A row names its function by a dotted path, which is resolved when something is computed. So the names of methods can be
listed, parsed and refused without torch.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from scaled_rope.scaling.parameters import (
    AbfParams,
    ClipParams,
    DpeParams,
    DualChunkParams,
    LeakyReRopeParams,
    Llama3Params,
    LongRopeParams,
    NtkMixedParams,
    PartNtkParams,
    ProportionalParams,
    ReRopeParams,
    SelfExtendParams,
)

MethodFn = Callable[..., Any]
"""(scaling, dim, factor [...], seq_len [...] | None) -> (inv_freq [..., dim/2], attention_factor [...]); of methods
that change attention: (scaling) -> `scaled_rope.attention.regions.Regions`."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """A scaling method and what it needs."""

    name: str
    function: str
    """Where the method is computed, "package.module:function" inside `scaled_rope`; see `MethodFn`."""
    fields: frozenset[str]
    """The optional fields of `RopeScaling` that the method takes; any other one that is set is an error."""
    source: str
    """Where the formula is from: a paper's arXiv number, or an address."""
    summary: str
    """One line for tables and error messages."""
    params_type: type | None = None
    """A frozen dataclass that `RopeScaling.params` must fit, or None when the method has no parameters."""
    below_original: str = ""
    """Name of the parameter that must be below L; empty when there is none."""
    kind: Literal["frequency", "attention"] = "frequency"
    """"attention" methods change attention itself and have no table of frequencies."""
    length_dependent: bool = False
    """Whether frequencies depend on the sequence length even without `dynamic`."""
    needs_original: bool = False
    """Whether the formula contains L, that is `original_max_position_embeddings`."""
    factor_times_original: Literal["length", "least", "nothing"] = "length"
    """The meaning of factor·L: "length", the length that the scaling is for; "least", one that it is for at least, as
    checkpoints are trained beyond it (Llama 3.1: 8·8192 tokens, and 131072 in its config); "nothing"."""
    factor_optional: bool = False
    """Whether a spec may leave the factor out: it only says for which length the scaling is meant, or is often 1."""
    no_dynamic: str = ""
    """Why the method has no dynamic form; empty when it has one."""

    @property
    def fn(self) -> MethodFn:
        """The function itself. The first use imports its module, and torch with it."""
        return _resolved(self.function)

    @property
    def formula(self) -> str:
        """The docstring of the function, read from its source file: nothing is imported."""
        module, _, name = self.function.partition(":")
        source = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
        for node in ast.parse(source.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return ast.get_docstring(node) or ""
        raise LookupError(f"scaled_rope.{module} has no function {name}")


@functools.cache
def _resolved(function: str) -> MethodFn:
    module, _, name = function.partition(":")
    found: MethodFn = getattr(importlib.import_module(f"scaled_rope.{module}"), name)
    return found


def _frequency(name: str, *fields: str, source: str, summary: str, **columns: Any) -> Method:
    """The row of a method that changes frequencies; its function in `scaling.frequencies` has the method's name."""
    function = f"scaling.frequencies:{name.replace('-', '_')}"
    return Method(name=name, function=function, fields=frozenset(fields), source=source, summary=summary, **columns)


def _attention(name: str, source: str, summary: str, params_type: type, below_original: str) -> Method:
    """The row of a method that changes attention; its function in `attention.methods` has the method's name."""
    return Method(
        name=name,
        function=f"attention.methods:{name.replace('-', '_')}",
        fields=frozenset({"factor"}),
        source=source,
        summary=summary,
        params_type=params_type,
        below_original=below_original,
        kind="attention",
        needs_original=True,
        factor_optional=True,
        no_dynamic="it has no scale",
    )


_SCALED = ("factor", "dynamic")
_BY_PARTS = (*_SCALED, "beta_fast", "beta_slow", "ramp", "truncate", "extrapolation_factor")
_CLIPPED: dict[str, Any] = {
    "params_type": ClipParams,
    "factor_optional": True,
    "no_dynamic": "what it clips does not depend on s",
}

_ROWS = (
    _frequency("default", source="RoFormer, arXiv 2104.09864", summary="unscaled RoPE", no_dynamic="it has no scale"),
    _frequency("linear", *_SCALED, source="arXiv 2306.15595; YaRN eq. 10, 12", summary="position interpolation (PI)"),
    _frequency("ntk", *_SCALED, source="arXiv 2309.00071 (YaRN), eq. 14-16", summary="NTK-aware: a larger base"),
    _frequency(
        "ntk-by-parts",
        *_BY_PARTS,
        source="arXiv 2309.00071 (YaRN), eq. 17-20",
        summary="YaRN's frequencies without its attention factor",
        needs_original=True,
    ),
    _frequency(
        "yarn",
        *_BY_PARTS,
        "attention_factor",
        "mscale",
        source="arXiv 2309.00071 (YaRN), eq. 17-22",
        summary="NTK-by-parts and an attention temperature",
        needs_original=True,
    ),
    _frequency(
        "part-ntk",
        *_SCALED,
        "extrapolation_factor",
        source="first NTK-by-parts, github.com/jquesnelle/yarn",
        summary="θ/s for long waves, NTK-aware for middle, θ for short",
        params_type=PartNtkParams,
        needs_original=True,
    ),
    _frequency(
        "llama3",
        *_SCALED,
        source="Llama 3.1, arXiv 2407.21783",
        summary="a ramp in rotations from 1 to 4, no attention factor",
        params_type=Llama3Params,
        needs_original=True,
        factor_times_original="least",
    ),
    _frequency(
        "longrope",
        "factor",
        "attention_factor",
        source="LongRoPE, arXiv 2402.13753, as in transformers",
        summary="a divisor per frequency, one list up to L, one beyond",
        params_type=LongRopeParams,
        needs_original=True,
        length_dependent=True,
        no_dynamic="its frequencies switch at L already",
    ),
    _frequency(
        "abf",
        "factor",
        source="adjusted base frequency, arXiv 2309.16039",
        summary="another base, chosen by hand",
        params_type=AbfParams,
        factor_optional=True,
        no_dynamic="its base does not depend on s",
    ),
    _frequency(
        "dynamic-ntk",
        "factor",
        source="'dynamic', github.com/huggingface/transformers",
        summary="a base that grows with the length, s = α·l'/L - (α-1)",
        needs_original=True,
        length_dependent=True,
        factor_times_original="nothing",
        no_dynamic="it is one already",
    ),
    _frequency(
        "ntk-mixed",
        *_SCALED,
        source="NTK-RoPE-mixed (Su), kexue.fm/archives/9706",
        summary="θ_m / exp(a·m^0.625): a smooth change from θ to θ/s",
        params_type=NtkMixedParams,
    ),
    _frequency(
        "proportional",
        *_SCALED,
        source="p-RoPE, arXiv 2410.06205, as in transformers",
        summary="the lowest frequencies 0, the others divided by s",
        params_type=ProportionalParams,
        factor_optional=True,
    ),
    _frequency(
        "cope",
        "factor",
        source="Clipped RoPE, arXiv 2602.05258",
        summary="the lowest frequencies tapered to 0 by a cosine",
        **_CLIPPED,
    ),
    _frequency(
        "hardclip",
        "factor",
        source="the baseline of Clipped RoPE, arXiv 2602.05258",
        summary="the lowest frequencies set to 0",
        **_CLIPPED,
    ),
    _frequency(
        "drope",
        "factor",
        source="DroPE, arXiv 2512.12167",
        summary="0: no rotary embedding at all",
        factor_optional=True,
        no_dynamic="its frequencies are 0 whatever s is",
    ),
    _attention(
        "rerope",
        "ReRoPE (Su), kexue.fm/archives/9708",
        "attention: no distance beyond a window",
        ReRopeParams,
        below_original="window",
    ),
    _attention(
        "leaky-rerope",
        "Leaky ReRoPE (Su), kexue.fm/archives/9728",
        "attention: distances beyond a window divided by k",
        LeakyReRopeParams,
        below_original="window",
    ),
    _attention(
        "self-extend",
        "Self-Extend, arXiv 2401.01325",
        "attention: positions beyond a window in groups",
        SelfExtendParams,
        below_original="window",
    ),
    _attention(
        "dpe",
        "DPE, arXiv 2504.18857",
        "attention: grouped as self-extend, by dimension",
        DpeParams,
        below_original="window",
    ),
    _attention(
        "dual-chunk",
        "dual chunk attention, arXiv 2402.17463",
        "attention: positions within chunks",
        DualChunkParams,
        below_original="chunk",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}
"""Every method by name."""
assert len(METHODS) == len(_ROWS), "two methods of one name"
