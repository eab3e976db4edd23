"""Figures of the results of the search."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.files import write_atomic
from scaled_rope.results import Row
from scaled_rope.tuning.curves import BLUE, GREY, LEVEL, ORANGE, Tuned, best_counts, segment_bounds, segment_changes

Draw = Callable[[Any], None]


def write_tuning_figures(tuned: Sequence[Tuned], summary: Row, title: str, folder: Path) -> list[Path]:
    """Three PNGs per factor, after the paper's figures 2 to 4, and one of the fit; none without matplotlib."""
    drawings: dict[str, Draw] = {}
    for one, said in zip(tuned, summary["factors"], strict=True):
        drawings[f"perplexity-x{one.factor:g}"] = _draw_curve(one, said, title)
        drawings[f"segments-x{one.factor:g}"] = _draw_segments(one, title)
        drawings[f"histogram-x{one.factor:g}"] = _draw_histogram(one, title)
    if summary["fit"]:
        drawings["fit"] = _draw_fit(summary, title)
    return write_drawings(drawings, folder)


def write_constants_figures(summary: Row, title: str, folder: Path) -> list[Path]:
    """One PNG per factor: loss and retrieval of every candidate; none without matplotlib."""
    drawings = {f"constants-x{one['factor']:g}": _draw_constants(one, title) for one in summary["factors"]}
    return write_drawings(drawings, folder)


def write_drawings(drawings: Mapping[str, Draw], folder: Path) -> list[Path]:
    """One PNG per drawing, by name; none without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("figures not drawn: pip install 'scaled-rope[eval]'", file=sys.stderr)
        return []
    paths = []
    style = {"axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.25, "legend.frameon": False}
    for name, draw in drawings.items():
        picture = io.BytesIO()
        # Not through pyplot, which would choose a display and keep every figure.
        with matplotlib.rc_context({**style, "font.size": 10}):
            figure = Figure(figsize=(5.6, 3.6), layout="constrained")
            draw(figure.subplots())
            figure.savefig(picture, format="png", dpi=110, metadata={"Software": None})
        paths.append(folder / f"{name}.png")
        write_atomic(paths[-1], picture.getvalue())
    return paths


def _draw_curve(one: Tuned, said: Row, title: str) -> Draw:
    """Figure 2: perplexity against √(1/t)."""

    def draw(axes: Any) -> None:
        axes.plot(one.grid, np.exp(one.curve), "o-", color=BLUE, markersize=4)
        axes.axvline(said["attention_factor"], color=ORANGE, label=f"best, {said['attention_factor']:.3f}")
        if said["interval"]:
            axes.axvspan(*said["interval"], color=ORANGE, alpha=0.2, lw=0, label=f"its {LEVEL:.0%} interval")
        paper = said["paper_attention_factor"]
        axes.axvline(paper, color=GREY, linestyle="--", label=f"0.1·ln s + 1 = {paper:.3f}")
        axes.set(xlabel="√(1/t)", ylabel="perplexity", title=f"{title}, s = {one.factor:g}")
        axes.grid(axis="y")
        axes.legend(fontsize=9, frameon=True, edgecolor="none")

    return draw


def _draw_segments(one: Tuned, title: str) -> Draw:
    """Figure 3: relative change of perplexity against √(1/t), a line per segment."""
    baseline = int(np.argmin(np.abs(np.asarray(one.grid) - 1)))

    def draw(axes: Any) -> None:
        import matplotlib

        changes = 100 * segment_changes(one.means.mean(axis=1), baseline)
        bounds = segment_bounds(*one.lengths)
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(bounds)))
        for (start, end), line, color in zip(bounds, changes.T, colors, strict=True):
            axes.plot(one.grid, line, "o-", color=color, markersize=3, linewidth=1.3, label=f"{start}–{end}")
        axes.axhline(0, color=GREY, linewidth=0.8)
        label = f"change of perplexity from √(1/t) = {one.grid[baseline]:g} (%)"
        axes.set(xlabel="√(1/t)", ylabel=label, title=f"{title}, s = {one.factor:g}")
        axes.legend(title="positions", fontsize=7, title_fontsize=8, ncols=1 + (len(bounds) > 8))

    return draw


def _draw_histogram(one: Tuned, title: str) -> Draw:
    """Figure 4: for how many windows each √(1/t) is best, a row per segment."""

    def draw(axes: Any) -> None:
        counts = best_counts(one.means)
        bounds = segment_bounds(*one.lengths)
        axes.imshow(counts, aspect="auto", cmap="Blues", vmin=0, vmax=1.3 * counts.max())
        for y, line in enumerate(counts):
            for x, count in enumerate(line):
                if count:
                    axes.text(x, y, str(count), ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(one.grid)), [f"{x:g}" for x in one.grid], fontsize=8, rotation=45)
        axes.set_yticks(range(len(bounds)), [f"{start}–{end}" for start, end in bounds], fontsize=8)
        axes.set(xlabel="√(1/t)", ylabel="positions", title=f"{title}, s = {one.factor:g}: windows best there")

    return draw


def _draw_fit(summary: Row, title: str) -> Draw:
    """Best √(1/t) against s, with the fitted line and the paper's."""

    def draw(axes: Any) -> None:
        fit = summary["fit"]
        for one in summary["factors"]:
            low, high = one["interval"] or (one["attention_factor"],) * 2
            style = {"color": BLUE, "marker": "o", "capsize": 4, "fillstyle": "none" if one["edge"] else "full"}
            spread = [
                [max(0.0, one["attention_factor"] - low)],
                [max(0.0, high - one["attention_factor"])],
            ]
            axes.errorbar([one["factor"]], [one["attention_factor"]], yerr=spread, **style)
        ends = np.asarray([1.0, 1.15 * max(one["factor"] for one in summary["factors"])])
        axes.plot(ends, 1 + fit["a"] * np.log(ends), color=BLUE, label=f"fit: {fit['a']:.3f}·ln s + 1")
        if free := fit["free"]:
            label = f"free: {free['a']:.3f}·ln s + {free['intercept']:.3f}"
            axes.plot(ends, free["intercept"] + free["a"] * np.log(ends), ":", color=ORANGE, label=label)
        paper = fit["paper_a"]
        axes.plot(ends, 1 + paper * np.log(ends), "--", color=GREY, label=f"paper: {paper:g}·ln s + 1")
        axes.set(xscale="log", xlabel="s", ylabel="best √(1/t)", title=title)
        ticks = sorted({1.0, *(one["factor"] for one in summary["factors"])})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.grid()
        axes.legend(fontsize=9, frameon=True, edgecolor="none")

    return draw


def _draw_constants(one: Row, title: str) -> Draw:
    """Retrieval, or where it is left out the loss within L, against the loss beyond L; a point per candidate."""

    def draw(axes: Any) -> None:
        points = one["screened"]
        upright = "retrieval" if "retrieval" in points[0] else "perplexity_within"
        share = [100 * point["unscaled_pairs"] / point["pairs"] for point in points]
        places = [[point[name] for point in points] for name in ("perplexity_beyond", upright)]
        dots = axes.scatter(*places, c=share, cmap="viridis", s=26)
        axes.figure.colorbar(dots, label="pairs left unscaled (%)")
        marks = {"paper": ("X", GREY, "the paper's constants"), "best": ("*", ORANGE, one["best"]["spec"])}
        for name, (marker, color, label) in marks.items():
            point = next((point for point in points if point["spec"] == one[name]["spec"]), None)
            if point is not None and (name == "paper" or point["spec"] != one["paper"]["spec"]):
                place = [point["perplexity_beyond"]], [point[upright]]
                axes.scatter(*place, marker=marker, color=color, s=110, edgecolor="black", linewidth=0.6, label=label)
        label = "probability of answers" if upright == "retrieval" else "perplexity within L"
        axes.set(xlabel="perplexity beyond L", ylabel=label, title=f"{title}, s = {one['factor']:g}")
        axes.grid()
        axes.figure.legend(fontsize=8, loc="outside lower center", ncols=2)

    return draw
