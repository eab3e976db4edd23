"""The result of an inspection, and its layout."""

from __future__ import annotations

import dataclasses
import math
import shutil
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from scaled_rope.checkpoint import quiet_transformers
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.scaling_plots import spans

Level = Literal["error", "warning", "info"]
LEVELS: tuple[Level, ...] = ("error", "warning", "info")
SAME = 1e-4
"""Largest relative difference of a frequency, or of the attention factor, that counts as the same number: float32
arithmetic in another order stays below 1e-5, the smallest real fork (a rounded end of the ramp) is above 1e-2."""


@dataclass(frozen=True)
class Finding:
    """Something about a config or a model that its user should know."""

    code: str
    level: Level
    """"error": it does not do what it says; "warning": it may not; "info": good to know."""
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Number:
    """One value in effect."""

    name: str
    value: Any
    origin: str = ""
    """Where it is from: "config", "default", "derived" or a few words."""


@dataclass(frozen=True)
class Dimension:
    """One frequency."""

    index: int
    wavelength: float
    """2π/θ in tokens, before scaling."""
    rotations: float | None
    """Turns over L, before scaling; None when L is not known."""
    theta: float
    scaled: float
    divisor: float | None
    """θ divided by this gives the scaled θ; None where that is 0."""
    regime: str
    """"kept", "blended", "interpolated", "changed", "raised" or "stopped", see `scaling_plots.regimes`."""


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect`."""

    source: str
    model_type: str | None
    scaling: RopeScaling | None
    """None when the config cannot be read as any scaling."""
    head_dim: int | None
    numbers: tuple[Number, ...] = ()
    layers: dict[str, RopeScaling] = field(default_factory=dict)
    """Layer type -> its scaling, where they differ."""
    without_rope: tuple[int, ...] = ()
    """Layers that use no rotary embedding, by design of the family or because they were dropped."""
    lengths: dict[str, int | None] = field(default_factory=dict)
    """In tokens: "original", "extended", "max_position_embeddings", "sliding_window"; "shown" is the length that
    `dimensions` is for, None when it does not matter."""
    native: str | None = None
    """The rope_type by which transformers itself can express the scaling."""
    dimensions: tuple[Dimension, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def exit_code(self) -> int:
        """1 if there is a finding of level "error", else 0."""
        return int(any(finding.level == "error" for finding in self.findings))

    @property
    def codes(self) -> list[str]:
        """The codes of all findings, sorted."""
        return sorted(finding.code for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["scaling"] = self.scaling and self.scaling.to_dict()
        values["label"] = self.scaling and self.scaling.label
        values["numbers"] = {n.name: {"value": n.value, "origin": n.origin} for n in self.numbers}
        values["layers"] = {name: scaling.to_dict() for name, scaling in self.layers.items()}
        values["without_rope"] = list(self.without_rope)
        for name in ("dimensions", "findings"):
            values[name] = [dataclasses.asdict(one) for one in values[name]]
        return values

    def text(self, full: bool = False) -> str:
        """The report for people; full: every dimension instead of some sixteen."""
        return "\n".join(_lay_out(self, full))


def refusal_of(error: BaseException) -> str:
    """Why a config class refuses a config, in one line: some wrap the reason in a headline."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return reason.strip().removeprefix("ValueError: ").rstrip(".")


def shorten(value: Any) -> str:
    """A value of a config for a message, in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


@contextmanager
def quiet() -> Iterator[None]:
    """Without the logs and warnings of transformers and of the hub's client."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def describe_difference(
    theirs: Tensor, their_factor: float, ours: Tensor, our_factor: float, they: str, we: str
) -> str:
    """ ": frequencies up to 3.0x off (dimension 30), ..." or nothing when both are the same."""
    if theirs.shape != ours.shape:
        return f": {theirs.numel()} frequencies from {they}, {ours.numel()} {we}"
    a, b = theirs.double().cpu(), ours.double().cpu()
    off = torch.where(a == b, 0.0, (a - b).abs() / b.abs().clamp(min=1e-30))
    parts = []
    if float(off.max()) > SAME:
        worst = int(off.argmax())
        ratio = float(a[worst] / b[worst]) if b[worst] else math.inf
        size = f"{max(ratio, 1 / ratio):.2f} times" if not 0.9 < ratio < 1.1 else f"{float(off.max()):.1%}"
        parts.append(f"frequencies up to {size} off (dimension {worst})")
    if abs(their_factor - our_factor) > SAME * our_factor:
        parts.append(f"attention factor {their_factor:.4g} from {they}, {our_factor:.4g} {we}")
    return f": {', '.join(parts)}" if parts else ""


# ------------------------------------------------------------------------------------------------------------- showing


def _lay_out(report: Inspection, full: bool) -> Iterator[str]:
    kind = report.model_type or "no model_type"
    label = report.scaling.label if report.scaling is not None else "no scaling that can be read"
    yield f"{report.source}: {kind}, {label}"
    if report.numbers:
        yield ""
        width = max(len(number.name) for number in report.numbers)
        for number in report.numbers:
            value = _say(number.value)
            yield f"  {number.name:<{width}}  {value:<12}  {number.origin}".rstrip()
        native = f'yes, as rope_type "{report.native}"' if report.native else "no"
        yield f"  {'native to transformers':<{width}}  {native}"
    for name, scaling in report.layers.items():
        yield f"  layer type {name}: {scaling.label}, theta {scaling.rope_theta:g}"
    if report.without_rope:
        shown = ", ".join(map(str, report.without_rope[:8])) + (", …" if len(report.without_rope) > 8 else "")
        yield f"  without RoPE: layers {shown}"
    yield from _lay_out_lengths(report)
    if report.dimensions:
        yield from _lay_out_dimensions(report, full)
    yield ""
    if not report.findings:
        yield "no findings"
        return
    counts = {level: sum(f.level == level for f in report.findings) for level in LEVELS}
    words = [f"{n} {level}{'s' if n > 1 and level != 'info' else ''}" for level, n in counts.items() if n]
    yield f"findings: {', '.join(words)}"
    # Wide enough that a command or a name in a text is not cut, narrow enough to read.
    width = min(max(shutil.get_terminal_size((100, 0)).columns, 60), 110)
    for finding in report.findings:
        opening = f"  {finding.level} [{finding.code}] "
        yield from textwrap.wrap(opening + finding.text, width, subsequent_indent=" " * 6, break_long_words=False)
        if finding.remedy:
            remedy = f"      → {finding.remedy}"
            yield from textwrap.wrap(remedy, width, subsequent_indent=" " * 8, break_long_words=False)


def _lay_out_lengths(report: Inspection) -> Iterator[str]:
    if not report.lengths:
        return
    said = {
        "original": "trained on (L)",
        "extended": "extended to (L')",
        "max_position_embeddings": "max_position_embeddings",
        "sliding_window": "sliding window",
    }
    rows = [(text, report.lengths.get(name)) for name, text in said.items()]
    if all(value is None for _, value in rows):
        return
    yield ""
    yield "lengths in tokens"
    for text, value in rows:
        if value is not None:
            yield f"  {text:<25}{value:>9}"


def _lay_out_dimensions(report: Inspection, full: bool) -> Iterator[str]:
    parts = [
        f"{first}-{last} {name}" if last > first else f"{first} {name}"
        for name, first, last in spans([dimension.regime for dimension in report.dimensions])
    ]
    shown = report.lengths.get("shown")
    yield ""
    at = f" at {shown} tokens" if shown else ""
    yield f"dimensions{at}: " + (", ".join(parts) if len(parts) <= 8 else f"{len(parts)} alternating runs")
    header = ("d", "wavelength", "turns over L", "theta", "scaled", "divided by", "")
    rows = [header]
    for index in range(len(report.dimensions)) if full else _selected(report.dimensions):
        d = report.dimensions[index]
        rows.append(
            (
                str(d.index),
                f"{d.wavelength:.1f}",
                "-" if d.rotations is None else f"{d.rotations:.4g}",
                f"{d.theta:.4e}",
                f"{d.scaled:.4e}",
                "-" if d.divisor is None else f"{d.divisor:.4g}",
                d.regime,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[:-1], widths[:-1], strict=True)]
        yield f"  {'  '.join(cells)}  {row[-1]}".rstrip()
    if not full and len(rows) - 1 < len(report.dimensions):
        yield f"  ({len(rows) - 1} of {len(report.dimensions)} dimensions; --full shows all)"


def _selected(dimensions: Sequence[Dimension]) -> list[int]:
    """Some 16 indices: the ends of up to four runs of a regime, and others evenly between."""
    count, wanted = len(dimensions), 16
    if count <= wanted:
        return list(range(count))
    runs = spans([dimension.regime for dimension in dimensions])
    ends = {index for _, first, last in runs for index in (first, last)} if len(runs) <= 4 else set()
    chosen = {0, count - 1, *ends}
    even = [round(step * (count - 1) / (wanted - 1)) for step in range(wanted)]
    # Those that fill the largest gaps, until there are enough.
    while len(chosen) < wanted:
        chosen.add(max(even, key=lambda index: min(abs(index - other) for other in chosen)))
        if chosen >= set(even):
            break
    return sorted(chosen)


def _say(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e5 or not value.is_integer() else f"{value:.0f}"
    if isinstance(value, list | tuple):
        return f"{len(value)} values, {min(value):.4g} to {max(value):.4g}"
    return "-" if value is None else str(value)
