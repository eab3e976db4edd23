"""Pictures of what a scaling does to each frequency, for `scaled-rope inspect --plot` and `methods --figures`.

matplotlib is imported when something is drawn, and never needs a display.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from scaled_rope.report.drawing import GREY, INK, LINES, check_format, drawing, save_figure
from scaled_rope.scaling.examples import example
from scaled_rope.scaling.frequencies import at_length, compute_rope
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.scaling.registry import METHODS

REGIME_COLORS = {
    "kept": "#009e73",
    "blended": "#e69f00",
    "interpolated": "#0072b2",
    "changed": "#cc79a7",
    "raised": "#d55e00",
    "stopped": "#666666",
}
"""One colour per answer of `regimes`, from Okabe and Ito's palette."""


def regimes(divisors: Sequence[float], factor: float) -> list[str]:
    """The treatment of each frequency in a word, from its divisor.

    divisors: θ_d / θ'_d per frequency, infinite where it is set to 0. factor: s, or 1 where the method has none.

    "kept", "interpolated" (divided by s or more), "blended" (between), "changed" (slower, where no s says how much),
    "raised" (faster than unscaled) or "stopped".
    """

    def one(divisor: float) -> str:
        if math.isinf(divisor):
            return "stopped"
        # Float32 frequencies: 1e-5 is some hundred units in the last place.
        if abs(divisor - 1) < 1e-5:
            return "kept"
        if divisor < 1:
            return "raised"
        if factor <= 1:
            return "changed"
        return "interpolated" if divisor > factor * (1 - 1e-5) else "blended"

    return [one(divisor) for divisor in divisors]


def spans(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of equal names: (name, first index, last index)."""
    starts = [i for i, name in enumerate(names) if i == 0 or names[i - 1] != name]
    return [(names[first], first, after - 1) for first, after in pairwise([*starts, len(names)])]


def _tables(scaling: RopeScaling, head_dim: int, length: int | None) -> tuple[list[float], list[float], list[float]]:
    """(θ, θ', θ/θ') per frequency for sequences of `length` tokens; a divisor is infinite where θ' is 0."""
    unscaled = replace(RopeScaling.from_spec("default", scaling), turning_fraction=1.0)  # all frequencies turn
    theta = compute_rope(unscaled, head_dim)[0].double().tolist()
    scaled = compute_rope(scaling.of_frequencies, head_dim, length)[0].double().tolist()
    return theta, scaled, [a / b if b else math.inf for a, b in zip(theta, scaled, strict=True)]


def _wavelengths(inv_freq: Sequence[float]) -> list[float]:
    """2π/θ in tokens; not a number, which is not drawn, where θ is 0."""
    return [2 * math.pi / value if value else math.nan for value in inv_freq]


def _turns(original: int, wavelength: Any) -> Any:
    """Turns over L of a wavelength in tokens, or the wavelength of so many turns; matplotlib also asks for 0."""
    import numpy

    return original / numpy.maximum(wavelength, 1e-30)


def _shade(axes: Any, names: Sequence[str]) -> None:
    for name, first, last in spans(names):
        axes.axvspan(first - 0.5, last + 0.5, color=REGIME_COLORS[name], alpha=0.13, linewidth=0)


def _legend_of_regimes(axes: Any, names: Sequence[str], **options: Any) -> None:
    from matplotlib.patches import Patch

    shown = [name for name in REGIME_COLORS if name in names]
    axes.legend(handles=[Patch(color=REGIME_COLORS[name], alpha=0.35, label=name) for name in shown], **options)


def _free_corner(divisors: Sequence[float]) -> str:
    """Where the curve of the divisors leaves room for a legend: it rises from the lower left, or is flat and high."""
    return "lower left" if divisors[0] > 1.5 else "upper left"


def _mark_length(axes: Any, length: float, text: str, count: int) -> None:
    axes.axhline(length, color=INK, linewidth=0.9, linestyle=(0, (4, 3)))
    axes.annotate(text, (0.02 * count, length), xytext=(0, 2), textcoords="offset points", va="bottom", fontsize=8)


def _wavelength_panel(
    axes: Any, scaling: RopeScaling, lines: Mapping[str, Sequence[float]], lengths: bool, turns: bool = False
) -> None:
    """Wavelength against dimension, the first of `lines` being unscaled, with marks at L and L'; turns: an axis of
    rotations over L on the right."""
    count = 0
    colors = iter(LINES * 4)
    for index, (label, inv_freq) in enumerate(lines.items()):
        count = len(inv_freq)
        style = {"color": GREY, "linestyle": "--"} if index == 0 else {"color": next(colors)}
        axes.plot(range(count), _wavelengths(inv_freq), label=label, **style)
    axes.set_yscale("log")
    axes.minorticks_off()
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xlabel("dimension d")
    axes.set_ylabel("wavelength 2π/θ, tokens")
    original, extended = scaling.original_max_position_embeddings, scaling.max_position_embeddings
    if original is not None and turns:
        # The same curves, read on the right: how often a frequency turns within L.
        right = axes.secondary_yaxis("right", functions=(partial(_turns, original), partial(_turns, original)))
        right.set_ylabel("turns over L")
        right.spines["right"].set_visible(True)
        right.minorticks_off()
    if original is not None:
        _mark_length(axes, original, f"L = {original}", count)
    if lengths and extended is not None and original is not None and extended > original:
        _mark_length(axes, extended, f"L' = {extended}", count)


def _divisor_panel(axes: Any, divisors: Mapping[str, Sequence[float]]) -> None:
    """θ/θ' against dimension."""
    highest = lowest = 1.0
    colors = iter(LINES * 4)
    count = 0
    for label, values in divisors.items():
        finite = [value if math.isfinite(value) else math.nan for value in values]
        count = len(values)
        axes.plot(range(count), finite, color=next(colors), label=label)
        highest = max([highest, *(value for value in finite if value == value)])
        lowest = min([lowest, *(value for value in finite if value == value)])
    axes.set_yscale("log", base=2)
    axes.minorticks_off()
    # A frequency that a taper has almost stopped must not flatten the rest.
    axes.set_ylim(lowest / 1.15, max(min(highest, 512), 2) * 1.15)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_xlabel("dimension d")
    axes.set_ylabel("θ divided by")


def plot_scaling(scaling: RopeScaling, head_dim: int, path: Path, title: str, length: int | None = None) -> None:
    """Draw one model's scaling: wavelengths and divisors per dimension, marks at L and L', the regimes shaded.

    length: the length in tokens of the sequence, for a length-dependent scaling.

    Raises:
        ConfigError: matplotlib is missing; a file name that is neither .svg nor .png.
    """
    check_format(path)
    theta, scaled, divisors = _tables(scaling, head_dim, length)
    names = regimes_of(scaling, head_dim, length)
    with drawing() as pyplot:
        figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7.2, 6.2), sharex=True, height_ratios=(2, 1))
        for axes in (top, bottom):
            _shade(axes, names)
        label = scaling.label if length is None else f"{scaling.label} at {length} tokens"
        _wavelength_panel(top, scaling, {"unscaled": theta, label: scaled}, lengths=True, turns=True)
        top.set_xlabel("")
        top.set_title(title)
        top.legend(loc="lower right")
        _divisor_panel(bottom, {scaling.label: divisors})
        _legend_of_regimes(bottom, names, loc=_free_corner(divisors))
        save_figure(figure, path)
        pyplot.close(figure)


def regimes_of(scaling: RopeScaling, head_dim: int, length: int | None = None) -> list[str]:
    """`regimes` of every frequency for sequences of `length` tokens; rounded wavelengths count as what they were."""
    plain = RopeScaling.from_dict({**scaling.to_dict(), "resonance": False}).of_frequencies
    if length is not None:
        plain = at_length(plain, length)
    _, _, divisors = _tables(plain, head_dim, length)
    row = METHODS[plain.method]
    return regimes(divisors, 1.0 if row.factor_optional and plain.method != "proportional" else plain.factor)


# The figures of docs/methods.md ---------------------------------------------------------------------------------------
def write_scaling_figures(folder: Path, head_dim: int, theta: float, original: int, factor: float) -> list[Path]:
    """One SVG per method that has frequencies, `overview.svg` and `resonance.svg`; the files' paths.

    Raises:
        ConfigError: matplotlib is missing; numbers that a method cannot use.
    """
    names = [name for name, row in METHODS.items() if row.kind == "frequency"]
    scalings = {name: example(name, head_dim, theta, original, factor) for name in names}
    paths = [folder / "overview.svg", *(folder / f"{name}.svg" for name in names), folder / "resonance.svg"]
    with drawing() as pyplot:
        _draw_resonance(pyplot, scalings["yarn"], head_dim, paths[-1])
        _draw_overview(pyplot, scalings, head_dim, int(original * factor), paths[0])
        for path, scaling in zip(paths[1:-1], scalings.values(), strict=True):
            _draw_method(pyplot, scaling, head_dim, factor, path)
    return paths


def _draw_method(pyplot: Any, scaling: RopeScaling, head_dim: int, factor: float, path: Path) -> None:
    original = scaling.original_max_position_embeddings
    assert original is not None  # `example` gives it
    lengths: list[int | None]
    if scaling.method == "longrope":
        lengths, labels = [original, int(original * factor)], [f"up to {original} tokens", "beyond"]
    elif scaling.is_length_dependent:
        lengths = [original, *(int(original * f) for f in (2, factor) if f > 1)]
        labels = [f"{length} tokens" for length in lengths]
    else:
        lengths, labels = [None], [scaling.label]
    tables = [_tables(scaling, head_dim, length) for length in lengths]
    names = regimes_of(scaling, head_dim, lengths[-1])
    factors = [compute_rope(scaling, head_dim, length)[1] for length in lengths]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.6, 2.9))
    for axes in (left, right):
        _shade(axes, names)
    lines = {"unscaled": tables[0][0]} | {label: table[1] for label, table in zip(labels, tables, strict=True)}
    if scaling.method == "default":
        lines = {"unscaled": tables[0][0]}
    _wavelength_panel(left, scaling, lines, lengths=True)
    left.legend(loc="lower right")
    _divisor_panel(right, {label: table[2] for label, table in zip(labels, tables, strict=True)})
    _legend_of_regimes(right, names, loc=_free_corner(tables[-1][2]))
    title = f"longrope x{factor:g}" if scaling.method == "longrope" else scaling.label
    figure.suptitle(f"{title}, attention factor {factors[-1]:.4g}", x=0.01, ha="left", fontsize=10)
    save_figure(figure, path)
    pyplot.close(figure)


def _draw_resonance(pyplot: Any, scaling: RopeScaling, head_dim: int, path: Path) -> None:
    """Draw the effect of whole wavelengths: the short ones enlarged, and the change of all in percent."""
    whole = RopeScaling.from_dict({**scaling.to_dict(), "resonance": True})
    before, after = (_wavelengths(_tables(one, head_dim, None)[1]) for one in (scaling, whole))
    shown = max(4, sum(wavelength < 30 for wavelength in before))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.6, 2.9))
    left.plot(range(shown), before[:shown], color=GREY, linestyle="--", label=scaling.label)
    left.plot(range(shown), after[:shown], color=LINES[0], drawstyle="steps-mid", label="with resonance=true")
    left.set(xlabel="dimension d", ylabel="wavelength 2π/θ, tokens", xlim=(-0.5, shown - 0.5))
    left.legend(loc="upper left")
    change = [100 * (b / a - 1) for a, b in zip(before, after, strict=True)]
    right.axhline(0, color=INK, linewidth=0.9)
    right.plot(range(len(change)), change, color=LINES[0])
    right.set(xlabel="dimension d", ylabel="change of wavelength, %", xlim=(-0.5, len(change) - 0.5))
    figure.suptitle(f"resonance, on top of {scaling.label}", x=0.01, ha="left", fontsize=10)
    save_figure(figure, path)
    pyplot.close(figure)


def _draw_overview(pyplot: Any, scalings: Mapping[str, RopeScaling], head_dim: int, length: int, path: Path) -> None:
    """Draw the divisors of each method, in small panels on one scale."""
    columns = 5
    rows = math.ceil(len(scalings) / columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(9.0, 1.75 * rows), sharex=True, sharey=True, squeeze=False)
    cells = list(grid.flat)
    for axes, (name, scaling) in zip(cells, scalings.items(), strict=False):
        names = regimes_of(scaling, head_dim, length)
        _shade(axes, names)
        divisors = _tables(scaling, head_dim, length)[2]
        _divisor_panel(axes, {name: divisors})
        axes.set(xlabel="", ylabel="", title=name)
    for axes in cells[len(scalings) :]:
        axes.set_visible(False)
        cells[cells.index(axes) - columns].tick_params(labelbottom=True)
    largest = max(scaling.factor for scaling in scalings.values())
    cells[0].set_ylim(0.8, max(2.0, 4 * largest))
    figure.supxlabel("dimension d", fontsize=9)
    figure.supylabel(f"θ divided by, at {length} tokens", fontsize=9)
    save_figure(figure, path)
    pyplot.close(figure)
