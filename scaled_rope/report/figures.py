"""The figures of a report. Each is drawn once, by matplotlib, for the page (SVG), for slides (PNG) and papers (PDF)."""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaled_rope.evaluation.controls import Control
from scaled_rope.files import write_atomic
from scaled_rope.report import heatmap
from scaled_rope.report.drawing import drawing, squeeze
from scaled_rope.report.paper import PaperFigure
from scaled_rope.report.tables import (
    UNSCALED,
    Column,
    Section,
    Series,
    about,
    beside,
    common_contexts,
    perplexity_cell,
    share_cell,
    tables_of,
)
from scaled_rope.scaling.frequencies import compute_rope
from scaled_rope.scaling.registry import METHODS

# After Okabe and Ito: told apart with every common color blindness. Each for white paper and for a dark page.
PALETTE = (
    ("#0072b2", "#5fb4ec"),
    ("#d55e00", "#ff9a57"),
    ("#009e73", "#3fd0a5"),
    ("#b5538c", "#e59cc6"),
    ("#c98a00", "#f2c14e"),
    ("#4a9fd8", "#a9dcff"),
)
GREY = ("#7a7a7a", "#a6a6a6")
_INK, _EMPTY, _EDGE = "#222222", "#dddddd", "white"

_STYLE: dict[str, Any] = {
    "axes.grid": False,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9.5,
    "font.size": 9.5,
    "legend.fontsize": 8.5,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

WIDTH = 4.8  # inches: on a phone the text of a figure then has about the size of the page's small text
_CROWDED = 4
"""The most curves that are drawn with bands for their intervals."""
_FEW = 5
"""The most curves that are named beside their ends, instead of in a legend."""
_LABEL = 17  # characters in a line of such a name
_LINE = 0.062  # height of such a line, as a share of the axes


def css_color(color: int) -> str:
    """The page's CSS variable for a color of `Series.color`."""
    return "var(--grey)" if color < 0 else f"var(--c{color % len(PALETTE)})"


def _hex(color: int) -> str:
    return (GREY if color < 0 else PALETTE[color % len(PALETTE)])[0]


@dataclass
class Canvas:
    """The attributes that the page attaches to the parts of a drawing."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Id of an artist -> its attributes."""

    def part(self, key: str, tip: str = "") -> str:
        """Return a new id for an artist of the series `key`. tip: where its number comes from, if it shows one."""
        name = f"part{len(self.parts)}"
        self.parts[name] = {"data-s": key} | ({"data-tip": tip} if tip else {})
        return name


Draw = Callable[[Any, Canvas], None]


@dataclass(frozen=True)
class Curve:
    """A line through numbers: `x` in tokens, `y` with a tip each (none: a line without points) and 95 % intervals."""

    key: str
    """Curves and points with the same key are highlighted together on the page."""
    name: str
    color: int
    """As `Series.color`."""
    x: Sequence[float]
    y: Sequence[float]
    tips: Sequence[str] = ()
    intervals: Sequence[tuple[float, float] | None] = ()
    marker: str = "o"
    dashed: bool = False
    width: float = 1.4


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    name: str
    heading: str
    caption: str
    draw: Draw
    height: float
    """Inches on the page."""
    legend: Sequence[Curve] = ()
    """Curves to name beside the figure on the page, and below the picture in PNG and PDF."""

    def render(self, folder: Path) -> str:
        """Write NAME.png and NAME.pdf into `folder`, and return the SVG element for the page."""
        made: dict[str, bytes] = {}
        page = Canvas()
        for kind in ("svg", "png", "pdf"):
            canvas = page if kind == "svg" else Canvas()
            height = self.height + (0 if kind == "svg" else 0.19 * math.ceil(len(self.legend) / 2))
            with drawing(**_STYLE) as pyplot:
                figure = pyplot.figure(figsize=(WIDTH, height))
                self.draw(figure, canvas)
                if kind != "svg" and self.legend:
                    _legend(figure, self.legend)
                picture = io.BytesIO()
                dated = {"svg": "Date", "pdf": "CreationDate"}
                options: dict[str, Any] = {"dpi": 200} if kind == "png" else {"metadata": {dated[kind]: None}}
                figure.savefig(picture, format=kind, transparent=kind == "svg", **options)
                pyplot.close(figure)
                made[kind] = picture.getvalue()
        for kind in ("png", "pdf"):
            write_atomic(folder / f"{self.name}.{kind}", made[kind])
        return _for_page(made["svg"].decode(), self.name, page.parts)


def _for_page(svg: str, name: str, parts: Mapping[str, Mapping[str, str]]) -> str:
    """Turn an SVG file into an element that takes its size and colors from the page. parts: see `Canvas.parts`."""
    svg = squeeze(svg[svg.index("<svg") :])
    inks = {_INK: "currentColor", _EMPTY: "var(--line)", GREY[0]: css_color(-1)}
    inks |= {light: css_color(index) for index, (light, _) in enumerate(PALETTE)}
    for ink, variable in inks.items():
        svg = svg.replace(ink, variable)

    def attach(match: re.Match[str]) -> str:
        more = "".join(f' {key}="{html.escape(value)}"' for key, value in parts.get(match[1], {}).items())
        # Several drawings share the page, so their ids must differ.
        return f'id="{name}-{match[1]}"{more}'

    svg = re.sub(r'\bid="([^"]*)"', attach, svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    opening, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + " aria-hidden=true>" + rest


# ----------------------------------------------------------------------------------------------------------- curves


def _series_curve(series: Series, key: str, x: Sequence[float], y: Sequence[float], **more: Any) -> Curve:
    width = 2.4 if series.tuned else 1.4
    more |= {"marker": series.marker, "dashed": series.dashed}
    return Curve(key, series.name, series.color, x, y, width=width, **more)


def _plot(axes: Any, canvas: Canvas, curves: Sequence[Curve]) -> None:
    bands = len(curves) <= _CROWDED
    for curve in curves:
        color = _hex(curve.color)
        style = {"color": color, "linestyle": (0, (4, 2)) if curve.dashed else "-", "linewidth": curve.width}
        axes.plot(curve.x, curve.y, gid=canvas.part(curve.key), **style)
        known = [(x, *bounds) for x, bounds in zip(curve.x, curve.intervals, strict=False) if bounds]
        if bands and len(known) > 1:
            axes.fill_between(
                *zip(*known, strict=True), color=color, alpha=0.15, linewidth=0, gid=canvas.part(curve.key)
            )
        # Dots would hide a very dense curve; tiny ones still let the page show every number.
        size = 4.5 if len(curve.x) <= 24 else 0.1
        face = {"markerfacecolor": "none", "markeredgewidth": 1.2} if curve.dashed else {"markeredgewidth": 0}
        for x, y, tip in zip(curve.x, curve.y, curve.tips, strict=False):
            if math.isfinite(y):
                point = {"marker": curve.marker, "markersize": size, "color": color, "linestyle": "none", **face}
                axes.plot([x], [y], gid=canvas.part(curve.key, tip), **point)


def _legend(figure: Any, curves: Sequence[Curve]) -> None:
    """Draw the curves' names below the picture, in two columns."""
    from matplotlib.lines import Line2D

    handles = []
    for curve in curves:
        color = _hex(curve.color)
        dash = (0, (4, 2)) if curve.dashed else "-"
        line = Line2D([], [], color=color, linestyle=dash, linewidth=curve.width, marker=curve.marker, markersize=4.5)
        line.set_markerfacecolor("none" if curve.dashed else color)
        line.set_label(curve.name)
        handles.append(line)
    figure.legend(handles=handles, loc="outside lower center", ncols=2)


def _end_labels(axes: Any, canvas: Canvas, curves: Sequence[Curve]) -> None:
    """Name curves at their right ends, moved apart where they would overlap. The y axis is logarithmic and final."""
    low, high = (math.log(bound) for bound in axes.get_ylim())
    ends: list[tuple[float, Curve]] = []
    for curve in curves:
        known = [y for y in curve.y if math.isfinite(y) and y > 0]
        if known:
            ends.append(((math.log(known[-1]) - low) / (high - low), curve))
    ends.sort(key=lambda one: one[0])
    names = [textwrap.wrap(curve.name, _LABEL) for _, curve in ends]
    heights = [_LINE * len(name) for name in names]
    places = [min(max(place, height / 2), 1 - height / 2) for (place, _), height in zip(ends, heights, strict=True)]
    for _ in range(100):  # push neighbours apart a little at a time; few labels come to rest soon
        for index in range(len(places) - 1):
            lack = (heights[index] + heights[index + 1]) / 2 - (places[index + 1] - places[index])
            if lack > 0:
                places[index] -= lack / 2
                places[index + 1] += lack / 2
    for (_, curve), name, place in zip(ends, names, places, strict=True):
        style = {"color": _hex(curve.color), "fontsize": 8, "va": "center", "linespacing": 1.0}
        weight = "bold" if curve.width > 2 else "normal"
        text = "\n".join(name)
        axes.text(1.02, place, text, transform=axes.transAxes, gid=canvas.part(curve.key), weight=weight, **style)


def _logarithmic(axis: Any, low: float, high: float) -> None:
    """Label an axis with plain numbers at 1, 2 and 5 times powers of ten, or finer where the axis is short."""
    from matplotlib import ticker

    decades = math.log10(high / low) if low > 0 and high > low else 0.0
    subs = (
        (1.0,) if decades > 4 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
    )
    axis.set_major_locator(ticker.LogLocator(base=10, subs=subs, numticks=12))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter("{x:g}")


def short_length(length: float) -> str:
    """A context length as an axis shows it: 512, 2k, 1.5k, 128k."""
    return f"{length:g}" if length < 1024 or length % 128 else f"{length / 1024:g}k"


def _length_axis(axes: Any, lengths: Sequence[int]) -> None:
    """Make the x axis logarithmic and name as many of the lengths as there is room for, the longest always."""
    axes.set_xscale("log")
    span = math.log2(max(lengths) / min(lengths)) or 1.0
    named: list[int] = []
    for length in sorted(lengths, reverse=True):
        # 0.09 of the axis is about the width of a label such as "128k".
        if not named or math.log2(named[-1] / length) > 0.09 * span:
            named.append(length)
    axes.set_xticks(named, [short_length(length) for length in named])
    axes.set_xticks([], minor=True)


def _mark_contexts(axis: Any, line: Callable[..., Any], trained: int | None, extended: int | None) -> None:
    """Mark the trained and the extended context on one axis of a plot."""
    for length, style in ((trained, ":"), (extended, "--")):
        if length is not None:
            line(length, color=GREY[0], linestyle=style, linewidth=1, zorder=0)


def _contexts_in_words(trained: int | None, extended: int | None) -> str:
    said = []
    if trained is not None:
        said.append(f"dotted line: trained context, {trained} tokens")
    if extended is not None:
        said.append(f"dashed: extended context, {extended}")
    return f" {'; '.join(said).capitalize()}." if said else ""


def perplexity_figure(section: Section, name: str, keys: Mapping[Series, str]) -> Figure | None:
    """Perplexity along the context; None where there is one length only.

    Buckets of one series that overlap, because they were measured with several sets of lengths, are several curves.
    """
    lengths = sorted({length for length, _ in section.columns})
    if len(lengths) < 2:
        return None
    sliding = section.topic.setting("name") == "sliding"
    table = tables_of(section)[0]

    def place(column: Column) -> str:
        return f"window of {column[0]} tokens" if sliding else f"positions {column[1]}"

    curves: list[Curve] = []
    legend: list[Curve] = []
    for series in section.rows:
        rows = section.rows[series]
        first = len(curves)
        for columns in [sorted(rows)] if sliding else section.partitions(series):
            cells = {column: perplexity_cell(rows[column], not sliding) for column in columns}
            found = {column: cell for column, cell in cells.items() if not cell.row or not cell.row.get("error")}
            curves.append(
                _series_curve(
                    series,
                    keys[series],
                    [length for length, _ in found],
                    [math.nan if cell.value is None else cell.value for cell in found.values()],
                    tips=[about(series.full_name, cell, f"perplexity, {place(one)}") for one, cell in found.items()],
                    intervals=[cell.interval for cell in found.values()],
                )
            )
        legend.append(curves[first])
    for series, control in _controls_shown(section):
        cells = {
            column: perplexity_cell(row, not sliding)
            for column, row in sorted(section.controls[series][control].items())
            if not row.get("error")
        }
        line = beside(series, control)
        curve = Curve(
            keys[series],
            line.name,
            series.color,
            [length for length, _ in cells],
            [math.nan if cell.value is None else cell.value for cell in cells.values()],
            [about(line.full_name, cell, f"perplexity, {place(column)}") for column, cell in cells.items()],
            marker="",
            dashed=True,
            width=1.0,
        )
        curves.append(curve)
        legend.append(curve)
    trained, extended = common_contexts(section.rows)

    def draw(figure: Any, canvas: Canvas) -> None:
        axes = figure.subplots()
        axes.set(yscale="log", ylabel="perplexity")
        axes.set_xlabel("window (tokens)" if sliding else "end of position bucket (tokens)")
        _plot(axes, canvas, curves)
        _length_axis(axes, lengths)
        _logarithmic(axes.yaxis, *axes.get_ylim())
        axes.grid(axis="y", which="both")
        shown = [length if length and length <= 1.1 * lengths[-1] else None for length in (trained, extended)]
        _mark_contexts(axes, axes.axvline, *shown)
        if len(legend) <= _FEW:
            _end_labels(axes, canvas, legend)
        for length, word in zip(shown, ("trained to", "extended to"), strict=True):
            if length is not None and length >= lengths[0]:
                # Above the axes, where no curve is.
                place = {"ha": "left" if length == lengths[0] else "center", "va": "bottom", "fontsize": 8}
                aside = {"xytext": (0, 3), "textcoords": "offset points", "xycoords": axes.get_xaxis_transform()}
                axes.annotate(f"{word} {length}", (length, 1.0), **aside, **place)

    band = " Bands: 95 % intervals." if len(curves) <= _CROWDED and any(any(c.intervals) for c in curves) else ""
    what = "windows of each length" if sliding else "the tokens in each position bucket"
    mixed = " Buckets that end at one length begin at several: a line per set of lengths."
    band += mixed if len(lengths) < len(section.columns) else ""
    if section.controls and not sliding:
        band += " Thin dashed lines: the same tokens, read after the last ones only; below them the context helps."
    caption = (
        f"Perplexity of {what}, both axes logarithmic; lower is better.{band}{_contexts_in_words(trained, extended)}"
    )
    return Figure(name, table.title, caption, draw, 3.5, [] if len(legend) <= _FEW else legend)


def _controls_shown(section: Section) -> list[tuple[Series, Control]]:
    """The controls that are drawn: those of trained models and of the base, or all where there are few."""
    found = [(series, control) for series, controls in section.controls.items() for control in controls]
    if len(found) <= _CROWDED // 2:
        return found
    tuned = [one for one in found if one[0].tuned]
    return tuned + [one for one in found if one[0].scaling.method == "default"]


# --------------------------------------------------------------------------------------------------------- passkeys


def passkey_figure(section: Section, name: str) -> Figure | None:
    """The keys found by length and depth; None if no row has its prompts. The base and what it became come first."""
    trained, _ = common_contexts(section.rows)
    ordered = sorted(section.rows, key=lambda one: (one.scaling.method != "default", not one.tuned))
    panels = [heatmap.Panel.of_rows(series.name, section.lengths(series), trained) for series in ordered]
    panels = [panel for panel in panels if any(panel.prompts.values())]
    if not panels:
        return None

    def draw(figure: Any, canvas: Canvas) -> None:
        heatmap.draw(figure, panels, compact=True)

    caption = "Share of keys found by prompt length and place of the key in the text; yellow is all, dark blue none."
    if any(len(prompts) > 9 * heatmap.COMPACT_BINS for panel in panels for prompts in panel.prompts.values()):
        caption += " Numbers without a fraction: percent."
    if any(panel.reach for panel in panels):
        caption += f" Orange line: keys below it stand in the last {trained} tokens, which a cut text would keep."
    height = 0.6 + 1.15 * math.ceil(len(panels) / 2)
    return Figure(name, "By length and place of the key", caption, draw, height)


# ------------------------------------------------------------------------------------------------------- benchmarks

_PANELS = 2  # side by side


def benchmark_figure(section: Section, name: str, keys: Mapping[Series, str]) -> Figure:
    """A dot with its 95 % interval for each task and series."""
    tasks, everyone = section.columns, list(section.rows)

    def draw(figure: Any, canvas: Canvas) -> None:
        lines = math.ceil(len(tasks) / _PANELS)
        panels = figure.subplots(lines, min(_PANELS, len(tasks)), sharey=True, squeeze=False)
        for axes, task in zip(panels.flat, tasks, strict=False):
            for place, series in enumerate(everyone):
                row = section.rows[series].get(task)
                if row is None:
                    continue
                cell, color = share_cell(row), _hex(series.color)
                if cell.value is None:
                    continue
                if cell.interval:
                    axes.plot(cell.interval, [place, place], color=color, linewidth=1.2, gid=canvas.part(keys[series]))
                tip = about(series.full_name, cell, task[1])
                face = {"markerfacecolor": "none"} if series.dashed else {}
                point = {"marker": series.marker, "color": color, "markersize": 5, **face}
                axes.plot([cell.value], [place], gid=canvas.part(keys[series], tip), **point)
            axes.set_title(task[1].partition(",")[0], fontsize=9)
            axes.grid(axis="x")
            axes.tick_params(axis="x", labelsize=8)
            axes.tick_params(axis="y", length=0, labelsize=8.5)
            axes.locator_params(axis="x", nbins=4)
        for axes in panels.flat[len(tasks) :]:
            axes.remove()
        first = panels.flat[0]
        first.set_yticks(range(len(everyone)), [series.name for series in everyone])
        first.set_ylim(len(everyone) - 0.5, -0.5)
        figure.supxlabel("%", fontsize=9)

    height = (0.75 + 0.21 * len(everyone)) * math.ceil(len(tasks) / _PANELS) + 0.1
    caption = "Score of each scaling with its 95 % interval; where intervals overlap a difference may be chance."
    cells = {(series, task): share_cell(row) for series in everyone for task, row in section.rows[series].items()}
    if cut := [f"{series.name}, {task[1]}" for (series, task), cell in cells.items() if cell.cut]:
        caption += f" Prompts were cut: {'; '.join(cut)}."
    return Figure(name, "Benchmarks", caption, draw, height)


# ------------------------------------------------------------------------------------------- frequencies and losses


def wavelength_figure(everyone: Sequence[Series], name: str, longest: int) -> Figure | None:
    """Wavelength of each rotated pair of dimensions; scalings with the same frequencies share a curve.

    longest: the length in tokens for which length-dependent scalings are shown.
    """
    curves: dict[tuple[float, ...], list[Series]] = {}
    longest = max([longest, *(series.scaling.original_max_position_embeddings or 1 for series in everyone)])
    for series in everyone:
        if METHODS[series.scaling.method].kind != "frequency":
            continue
        length = longest if series.scaling.is_length_dependent else None
        inv_freq, _ = compute_rope(series.scaling, series.head_dim, seq_len=length)
        waves = [2 * math.pi / value if value else math.inf for value in inv_freq.double().tolist()]
        curves.setdefault(tuple(waves), []).append(series)
    if len(curves) < 2:
        return None
    trained, extended = common_contexts(everyone)
    named = {
        waves: ", ".join(
            dict.fromkeys(
                f"{one.method_name} at {longest}" if one.scaling.is_length_dependent else one.method_name
                for one in members
            )
        )
        for waves, members in curves.items()
    }

    def draw(figure: Any, canvas: Canvas) -> None:
        axes = figure.subplots()
        for waves, members in curves.items():
            shown = [wave if math.isfinite(wave) else math.nan for wave in waves]
            style = {"linestyle": (0, (4, 2)) if members[0].dashed else "-", "linewidth": 1.6}
            axes.plot(shown, color=_hex(members[0].color), label=named[waves], **style)
        axes.set(yscale="log", xlabel="pair of dimensions", ylabel="wavelength (tokens)")
        axes.minorticks_off()
        axes.grid(axis="y")
        _mark_contexts(axes, axes.axhline, trained, extended)
        right = max(map(len, curves)) - 1
        for length, word in ((trained, "trained"), (extended, "extended")):
            if length is not None:
                axes.text(right, length * 1.1, f"{word} context, {length}", fontsize=8, ha="right")
        figure.legend(loc="outside lower center", ncols=1)

    caption = "One full turn of each pair of rotated dimensions. Longer waves never turn fully in the context."
    caption += _contexts_in_words(trained, extended)
    return Figure(name, "Wavelength per dimension", caption, draw, 3.4 + 0.19 * len(curves))


def loss_figure(losses: Sequence[tuple[int, float]], name: str) -> Figure:
    """Training loss by optimizer step."""

    def draw(figure: Any, canvas: Canvas) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*losses, strict=True), color=_hex(1), linewidth=1.5)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(axis="y")

    return Figure(name, "Training loss", f"{len(losses)} optimizer steps.", draw, 2.8)


# -------------------------------------------------------------------------------------------------------- the paper


def _line_color(index: int) -> int:
    """The color of a line in a figure of the paper. The last is grey, which no unscaled line needs there."""
    return index if index < len(PALETTE) else UNSCALED


def paper_figure(paper: PaperFigure, name: str) -> Figure:
    """A figure of the paper: measured lines, published curves (thin), and the published table's values (crosses)."""
    curves: list[Curve] = []
    points: list[tuple[str, int, float, float, str]] = []
    for index, line in enumerate(paper.lines):
        key, color = f"p{index}", _line_color(index)
        if line.measured:
            cells = {length: perplexity_cell(row, False) for length, row in sorted(line.measured.items())}
            cells = {length: cell for length, cell in cells.items() if cell.row and not cell.row.get("error")}
            tips = [
                about(line.label, cell, f"perplexity of the first {length} tokens") for length, cell in cells.items()
            ]
            values = [math.nan if cell.value is None else cell.value for cell in cells.values()]
            curves.append(Curve(key, line.label, color, list(cells), values, tips))
        if line.curve:
            tips = [f"{line.label}\npublished curve, {length} tokens: {y:.4g}" for length, y in line.curve.items()]
            x, y = list(line.curve), list(line.curve.values())
            full = f"{line.label}, published"
            curves.append(Curve(key, full, color, x, y, tips, marker="none", dashed=True, width=0.9))
        for length, value in line.published.items():
            tip = f"{line.label}\npublished in the paper, {length} tokens: {value:g}"
            points.append((key, length, value, color, tip))

    def draw(figure: Any, canvas: Canvas) -> None:
        axes = figure.subplots()
        _plot(axes, canvas, curves)
        for key, length, value, color, tip in points:
            style = {"marker": "x", "markersize": 5.5, "markeredgewidth": 1.5, "color": _hex(int(color))}
            axes.plot([length], [value], gid=canvas.part(key, tip), linestyle="none", **style)
        seen = [value for curve in curves for value in curve.y if math.isfinite(value)] + [p[2] for p in points]
        axes.set(yscale="log", xlabel="context (tokens)", ylabel="perplexity")
        axes.set_ylim(0.95 * min(seen), min(1.05 * max(seen), paper.highest))
        _logarithmic(axes.yaxis, *axes.get_ylim())
        from matplotlib import ticker

        axes.xaxis.set_major_locator(ticker.MultipleLocator(paper.tick))
        axes.xaxis.set_major_formatter(lambda length, _: short_length(length))
        axes.grid(axis="y", which="both")

    said = "Crosses: numbers printed in the paper."
    if any(line.curve for line in paper.lines):
        said += " Dashed: the published curves."
    said += " Solid: measured." if any(line.measured for line in paper.lines) else " Nothing measured yet."
    caption = f"{paper.title}. {said} Cut off at a perplexity of {paper.highest:g}. {paper.note}".strip()
    legend = [Curve(f"p{index}", line.label, _line_color(index), [], []) for index, line in enumerate(paper.lines)]
    return Figure(name, f"Figure {paper.name} of the paper", caption, draw, 3.4, legend)


def figure_of(section: Section, name: str, keys: Mapping[Series, str]) -> Figure | None:
    """The figure of one section, if its metric has one.

    name: base name of its files.
    keys: a short identifier for each series.
    """
    metric = section.topic.metric
    if metric == "perplexity":
        return perplexity_figure(section, name, keys)
    if metric in ("passkey", "passkey_hard"):
        return passkey_figure(section, name)
    return benchmark_figure(section, name, keys) if metric == "benchmark" and not section.topic.by_length else None
