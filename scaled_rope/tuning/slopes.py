"""Find the slope of an attention temperature that suits a model best, without training.

    scaled-rope tune --slope drope -m MODEL --dataset FOLDER --factors 2,4,8 --grid 0:0.5:0.05 --output out/slope

The scaling is any method, under `attention_temperature=constant` (1 + slope·ln s, DroPE's), "log" or another kind.
Windows of s·L tokens are scored in one forward pass for each slope of the grid, as in the search for the attention
factor. One slope is to serve all lengths, so what is minimised is the mean loss over all factors; the best slope of
each factor alone says how well that fits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scaled_rope.evaluation.formatting import format_perplexity, format_table
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.tuning.curves import (
    DRAWS,
    LEVEL,
    Floats,
    Minimum,
    bootstrap_minima,
    interval,
    parabola_minimum,
    resample,
)
from scaled_rope.tuning.measurement import Sweep


@dataclass(frozen=True)
class SlopeCurve:
    """The losses under each slope at one factor."""

    start: RopeScaling
    grid: tuple[float, ...]
    per_window: Floats
    """Nats per token [grid, windows]."""

    @property
    def curve(self) -> Floats:
        """Nats per token over all windows, [grid]."""
        mean: Floats = self.per_window.mean(axis=1)
        return mean


def measure_slopes(sweep: Sweep, start: RopeScaling, grid: tuple[float, ...]) -> SlopeCurve:
    """Score all windows under each slope.

    Args:
        start: a scaling with an attention temperature.
        grid: slopes, ascending; 0 is the scaling without its temperature.

    Raises:
        ConfigError: losses that are not finite.
    """
    length, segment = start.max_position_embeddings, sweep.segment
    assert length is not None  # the search needs the original length
    means = sweep.measure([replace(start, temperature_slope=slope) for slope in grid])
    targets = [min(first + segment, length) - max(first, 1) for first in range(0, length, segment)]
    return SlopeCurve(start, grid, means @ [count / (length - 1) for count in targets])


def summarise_slopes(curves: Sequence[SlopeCurve], seed: int, model: RopeScaling | None = None) -> Row:
    """The results as plain data: the content of best.json except for the provenance.

    model: what the checkpoint carries, see `RopeScaling.to_spec`.
    """
    grid = curves[0].grid
    together = sum(one.per_window for one in curves[1:]) + curves[0].per_window
    together = together / len(curves)
    windows = together.shape[1]
    samples = resample(windows, seed) if windows > 1 else None

    def minimum(per_window: Floats) -> tuple[Minimum, list[float] | None]:
        drawn = None if samples is None else [one.x for one in bootstrap_minima(grid, per_window, samples)]
        return parabola_minimum(grid, per_window.mean(axis=1)), None if drawn is None else list(interval(drawn))

    best, spread = minimum(together)
    factors = []
    for one in curves:
        own, own_spread = minimum(one.per_window)
        scaling = replace(one.start, temperature_slope=round(best.x, 4))
        factors.append(
            {
                "factor": one.start.factor,
                "slope": own.x,
                "interval": own_spread,
                "edge": own.edge,
                "perplexity": math.exp(own.y),
                "perplexity_without": math.exp(float(one.curve[0])) if grid[0] == 0 else None,
                "spec": scaling.to_spec(model),
                "scaling": scaling.to_dict(),
                "curve": [[x, math.exp(y)] for x, y in zip(grid, one.curve, strict=True)],
            }
        )
    return {
        "attention_temperature": curves[0].start.attention_temperature,
        "slope": best.x,
        "interval": spread,
        "edge": best.edge,
        "windows": windows,
        "level": LEVEL,
        "draws": DRAWS,
        "seed": seed,
        "factors": factors,
    }


def slopes_report(summary: Row) -> str:
    """The table and the slope, for the terminal."""

    def between(low_high: Sequence[float] | None) -> str:
        return "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"

    rows = [
        [
            f"{one['factor']:g}",
            f"{one['slope']:.3f}" + ("*" if one["edge"] else ""),
            between(one["interval"]),
            format_perplexity(one["perplexity"]),
            "" if one["perplexity_without"] is None else format_perplexity(one["perplexity_without"]),
            one["spec"],
        ]
        for one in summary["factors"]
    ]
    header = ["factor", "its slope", f"{summary['level']:.0%} interval", "ppl", "ppl (slope 0)", "scaling"]
    spread = f" ({summary['level']:.0%}: {between(summary['interval'])})" if summary["interval"] else ""
    kind, slope = summary["attention_temperature"], summary["slope"]
    return f"{format_table(header, rows)}\n\nslope of attention_temperature={kind} for all factors: {slope:.4f}{spread}"


def slopes_remarks(summary: Row) -> list[str]:
    """Warnings that a reader of the results needs."""
    notes = []
    if summary["edge"] == "upper":
        notes.append(f"the best slope is the grid's upper edge, {summary['slope']:g}: widen --grid")
    elif summary["edge"] == "lower":
        lowest = "no temperature is best" if summary["slope"] == 0 else "widen --grid"
        notes.append(f"the best slope is the grid's lower edge, {summary['slope']:g}: {lowest}")
    if summary["windows"] == 1:
        notes.append("one window: no interval can be given; see --documents and --windows")
    own = [one["slope"] for one in summary["factors"]]
    low_high = summary["interval"]
    if low_high and (min(own) < low_high[0] or max(own) > low_high[1]):
        notes.append(
            f"factors want slopes of their own, {min(own):.3f} to {max(own):.3f}: a single one is a compromise"
        )
    return notes
