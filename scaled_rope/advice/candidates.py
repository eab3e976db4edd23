"""The scalings that are tried on a model for a target length, the likeliest first, and which of them share passes.

Most are listed before anything is read (`short_list`). What DPE's probe finds comes to them (`dpe_probe`), and in the
second round the better ones that have no attention factor are tried with an attention temperature as well (`sharper`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from scaled_rope.scaling.constants import beta_grids, constants_note
from scaled_rope.scaling.frequencies import at_length, rope_values
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS
from scaled_rope.scaling.resolve import resolve_scaling
from scaled_rope.tuning.dimension_groups import WINDOW, GroupProbe

_ATTENTION_STEPS = (0.5, 1.5)
"""YaRN's ln √(1/t) is tried times these besides 1; times 0 is NTK-by-parts."""
_NTK_MORE = 2.0
"""NTK-aware scaling is tried with so many times the factor as well: it falls short of its own (YaRN, section 3.1)."""
SLOPES = (0.5, 1.0)
"""The slopes of a "log" temperature that are tried, over its default 1/ln L, which is ReRoPE's and SSMax's own."""


@dataclass(frozen=True)
class Candidate:
    """A scaling to try."""

    spec: str
    """As `--scaling` takes it."""
    scaling: RopeScaling

    @property
    def of_tables(self) -> bool:
        """Whether it is one table of frequencies for all lengths: what servers can be told, and what can be trained."""
        return not (self.scaling.beyond_tables or self.scaling.is_length_dependent)

    @property
    def changes_attention(self) -> bool:
        """Whether it changes attention itself, which no server computes."""
        return self.scaling.changes_attention


def number(value: float) -> str:
    """A number as specs have it: at most four decimals, none that say nothing."""
    return f"{round(value, 4):g}" if abs(value) < 1e5 else repr(value)


def short_list(
    own: RopeScaling, original: int, target: int, head_dim: int, also: Sequence[str] = (), only: bool = False
) -> list[Candidate]:
    """The candidates for a model, the likeliest first, without those that compute the same as an earlier one.

    Args:
        own: the scaling that the checkpoint carries.
        original: L, the length in tokens to which the model works by itself.
        target: the length in tokens that is wanted.
        also: specs of the user's, which come first.
        only: whether to try these and no others.

    Raises:
        ConfigError: a spec that is no scaling for this model.
    """
    listed = (
        _of_extended(own, original, target) if own.method != "default" else _of_base(own, original, target, head_dim)
    )
    specs = list(also) if only else [*also, *listed]
    found: dict[tuple[Any, ...], Candidate] = {}
    for spec in specs:
        one = Candidate(spec, resolve_scaling(spec, own))
        found.setdefault(identity(one.scaling, target, head_dim) + _dependence(one.scaling), one)
    found.pop(identity(own, target, head_dim) + _dependence(own), None)  # it is measured in any case
    return list(found.values())


def _dependence(scaling: RopeScaling) -> tuple[Any, ...]:
    """The difference between a scaling that follows the length and one that is the same at the target alone."""
    return (scaling.is_length_dependent,)


def _of_base(own: RopeScaling, original: int, target: int, head_dim: int) -> Iterator[str]:
    """Specs for a model that carries no scaling."""
    factor = factor_for(target, original)
    yarn = RopeScaling.from_spec(f"yarn:{factor}", own)
    logarithm = math.log(yarn.static_attention_factor)
    yield f"yarn:{factor}"
    yield "dynamic-yarn"
    if (
        constants_note(yarn, head_dim) is not None
    ):  # the betas halfway between the paper's rotations and its shares of pairs
        fast, slow = (grid[len(grid) // 2 - 1] for grid in beta_grids(yarn))
        yield f"yarn:{factor},beta_fast={number(fast)},beta_slow={number(slow)}"
    yield f"ntk-by-parts:{factor}"
    yield f"ntk:{number(float(factor) * _NTK_MORE)}"
    for times in _ATTENTION_STEPS:
        yield f"yarn:{factor},attention_factor={number(math.exp(times * logarithm))}"
    yield f"llama3:{factor}"
    yield from _attention_methods(original, target)
    yield f"ntk:{factor}"
    yield "dynamic-ntk"
    yield f"linear:{factor}"


def _of_extended(own: RopeScaling, original: int, target: int) -> Iterator[str]:
    """Specs for a model that was trained under a scaling: its own, for a longer text."""
    row, trained = METHODS[own.method], own.original_max_position_embeddings
    if "factor" not in row.fields or trained is None or row.kind != "frequency" or row.length_dependent:
        return
    by_ratio = row.factor_times_original == "length"
    # Llama 3.1 works to 131072 tokens at 8 times 8192: for twice as many its factor is doubled.
    yield f"checkpoint:{factor_for(target, trained if by_ratio else original / own.factor)}"
    if by_ratio and not row.no_dynamic and not own.dynamic:
        fields = _with_law(own).to_spec().partition(",")[2]
        yield f"dynamic-{own.method}:{number(own.factor)}" + (f",{fields}" if fields else "")


def _with_law(own: RopeScaling) -> RopeScaling:
    """YaRN with the `mscale` that gives its attention factor at its own factor, since a number would not follow s."""
    known = own.attention_factor
    if own.method != "yarn" or known is None or known < 1 or own.factor == 1:
        return own
    return replace(own, attention_factor=None, mscale=float(f"{(known - 1) / (0.1 * math.log(own.factor)):.10g}"))


def _attention_methods(original: int, target: int) -> Iterator[str]:
    """Methods that change attention itself, with windows in the proportions of their papers."""
    if original < WINDOW:
        return
    yield f"dual-chunk,chunk={original * 3 // 4}"
    window = original // 4
    group = math.ceil((target - window) / (original - window))
    yield f"self-extend,group={group},window={window}"  # its furthest position, window + (target - window)/group, is L
    yield f"rerope,window={original // 2}"


def dpe_probe(own: RopeScaling, original: int, target: int, head_dim: int) -> GroupProbe | None:
    """The probe that finds the groups of a `dpe` candidate; None where no method that changes attention is tried."""
    pairs = len(rope_values(own, head_dim)[0])
    if own.method != "default" or original < WINDOW or pairs < 2:
        return None
    return GroupProbe.of(original, target, pairs)


def sharper(candidate: Candidate, target: int) -> list[Candidate]:
    """A candidate with attention temperatures, where it leaves the logits as they are at the target.

    Within L they change nothing, unlike an attention factor.
    """
    scaling = candidate.scaling
    if scaling.attention_temperature is not None or at_length(scaling, target).static_attention_factor != 1:
        return []
    own = replace(scaling, attention_temperature="log").effective_temperature_slope
    found = []
    for times in SLOPES:
        slope = "" if times == 1 else f",temperature_slope={number(times * own)}"
        spec = f"{candidate.spec},attention_temperature=log{slope}"
        found.append(Candidate(spec, resolve_scaling(spec, scaling)))
    return found


def factor_for(target: int, original: float) -> str:
    """s for a target as specs have it: exact where a few digits are, else rounded up, never short of the target."""
    factor = target / original
    exact = f"{factor:.8g}"
    return exact if float(exact) == factor else f"{math.ceil(factor * 1e4) / 1e4:.10g}"


def identity(scaling: RopeScaling, length: int, head_dim: int) -> tuple[Any, ...]:
    """A key of what a model computes under a scaling in a pass that stands for `length` tokens."""
    if scaling.beyond_tables:
        return (at_length(scaling, length).label,)
    values, factor = rope_values(at_length(scaling, length), head_dim)
    return (tuple(float(f"{value:.6g}") for value in values), round(factor, 5))


class Passes:
    """Which static scaling stands for a candidate at a length: equal ones are the same record and share their passes.

    A scaling that follows the length is, for a text of some length, a static one. The first candidate that computes
    the same stands for all.
    """

    def __init__(self, candidates: Sequence[RopeScaling], lengths: Iterable[int], head_dim: int) -> None:
        """candidates: all that may be measured, in their order; lengths: those that are asked for, in tokens."""
        self._lengths, self._head_dim = list(lengths), head_dim
        self._first: dict[tuple[Any, ...], RopeScaling] = {}
        self._at: dict[tuple[RopeScaling, int], RopeScaling] = {}
        self._longest: dict[RopeScaling, int] = {}
        self.add(candidates)

    def add(self, candidates: Sequence[RopeScaling]) -> None:
        """Take up further candidates, after those that there are."""
        for length in self._lengths:
            for one in candidates:
                stands = self._first.setdefault(identity(one, length, self._head_dim), at_length(one, length))
                self._at[one, length] = stands
                self._longest[stands] = max(length, self._longest.get(stands, 0))

    def at(self, scaling: RopeScaling, length: int) -> RopeScaling:
        """The static scaling that stands for a candidate at a length."""
        return self._at[scaling, length]

    def longest(self, static: RopeScaling) -> int:
        """The longest length that a static scaling is needed for: its one pass yields the others."""
        return self._longest[static]
