"""Draw which keys were found, by length and depth: a panel per model and scaling, in one picture.

matplotlib is imported when something is drawn, and never needs a display.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.report.drawing import check_format
from scaled_rope.results import Row

MOST_BINS = 10
"""The most rows into which depths are binned."""
COMPACT_BINS = 5
"""Likewise in half of the size."""

_INK, _EMPTY = "#222222", "#dddddd"
_REACH = "#ff9a57"  # seen on both ends of the colors
_TITLE = 26  # characters in a line of a panel's title, in half of the size
_ANNOTATED = 12  # lengths up to which counts fit into the cells
_STYLE: dict[str, Any] = {
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.facecolor": "white",
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "scaled-rope",  # the same picture is the same file
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Panel:
    """Outcomes of one model: length in tokens -> (depth from 0 to 1, whether the key was found) of each prompt."""

    title: str
    prompts: Mapping[int, Sequence[tuple[float, bool]]]
    reach: Mapping[int, float] = field(default_factory=dict)
    """The depth from which on keys stand within the last tokens that a cut would keep, by length; none where it keeps
    all or where rows don't say."""

    @classmethod
    def of_rows(cls, title: str, rows: Mapping[int, Row], window: int | None = None) -> Panel:
        """Make a panel from result rows by length; rows without prompts (errors) are left out.

        window: the number of last tokens that a cut would keep, for `reach`.
        """
        kept = {length: row["prompts"] for length, row in rows.items() if "prompts" in row}
        reach: dict[int, float] = {}
        for length, prompts in kept.items():
            if window is None or length <= window or not all("distance" in one for one in prompts):
                continue
            outside = [one["depth"] for one in prompts if one["distance"] > window]
            inside = [one["depth"] for one in prompts if one["distance"] <= window]
            reach[length] = (max(outside, default=0.0) + min(inside, default=1.0)) / 2 if inside else 1.0
        shown = {n: [(one["depth"], one["right"]) for one in prompts] for n, prompts in kept.items()}
        return cls(title, shown, reach)

    def counts(self, length: int, bins: int) -> list[tuple[int, int]]:
        """(found, asked) in each bin of depths, from the start of the text to its end."""
        found, asked = [0] * bins, [0] * bins
        for depth, right in self.prompts.get(length, ()):
            place = min(int(depth * bins), bins - 1)
            found[place] += right
            asked[place] += 1
        return list(zip(found, asked, strict=True))


def draw(figure: Any, panels: Sequence[Panel], compact: bool = False) -> None:
    """Draw the panels, two to a line, on a figure with constrained layout; `compact` for half of the size."""
    lengths = sorted({length for panel in panels for length in panel.prompts})
    most = max(len(prompts) for panel in panels for prompts in panel.prompts.values())
    bins = min(COMPACT_BINS if compact else MOST_BINS, most)
    columns = min(2, len(panels))
    grid = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False, sharex=True, sharey=True)
    image = None
    for axes, panel in zip(grid.flat, panels, strict=False):
        cells = [panel.counts(length, bins) for length in lengths]
        shares = [[cells[x][y][0] / cells[x][y][1] if cells[x][y][1] else math.nan for x in range(len(lengths))]
                  for y in range(bins)]  # fmt: skip
        axes.set_facecolor(_EMPTY)  # shows where nothing was asked
        image = axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1, edgecolors="white", linewidth=0.5)
        if len(lengths) <= (_ANNOTATED // 2 if compact else _ANNOTATED):
            for x, column in enumerate(cells):
                for y, (found, asked) in enumerate(column):
                    if asked:
                        # cividis is dark below its middle and light above it.
                        ink = "#111111" if found / asked > 0.5 else "#f4f4f4"
                        place = {"ha": "center", "va": "center", "fontsize": 7.5, "zorder": 3}
                        # In half of the size a fraction with two figures below the line would run into the next one.
                        text = f"{found / asked:.0%}" if compact and asked > 9 else f"{found}/{asked}"
                        axes.text(x + 0.5, y + 0.5, text.rstrip("%"), color=ink, **place)
        for x, length in enumerate(lengths):
            if length in panel.reach:
                style = {"color": _REACH, "linewidth": 2.2, "clip_on": False, "zorder": 2}
                axes.plot([x, x + 1], [bins * panel.reach[length]] * 2, **style)
        axes.set_title(textwrap.fill(panel.title, _TITLE) if compact else panel.title, fontsize=8.5 if compact else 10)
        axes.set(xlim=(0, len(lengths)), ylim=(bins, 0))
        step = math.ceil(len(lengths) / (4 if compact else 8))
        shown = range((len(lengths) - 1) % step, len(lengths), step)  # the longest is always named
        axes.set_xticks([x + 0.5 for x in shown], [str(lengths[x]) for x in shown])
        axes.set_yticks([0, bins / 2, bins], ["start", "middle", "end"])
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
        grid[-2, -1].tick_params(labelbottom=True)  # it has become the lowest of its column
    below = "; keys below an orange line stand in the last tokens of the trained length"
    reached = not compact and any(panel.reach for panel in panels)
    figure.supxlabel(f"prompt length (tokens){below if reached else ''}", fontsize=9)
    figure.supylabel("place of the key", fontsize=9)
    if compact:
        return
    bar = figure.colorbar(image, ax=list(grid.flat[: len(panels)]), shrink=0.8, pad=0.02, aspect=30)
    bar.set_ticks([0, 0.5, 1], labels=["none", "half", "all found"])
    bar.outline.set_visible(False)


def save_heatmap(path: str | Path, panels: Sequence[Panel]) -> None:
    """Write the picture as SVG or PNG, by the name of the file; panels without prompts are left out.

    Raises:
        ConfigError: another suffix, no panel with prompts, or matplotlib is missing.
    """
    path = Path(path)
    check_format(path)
    panels = [panel for panel in panels if any(panel.prompts.values())]
    if not panels:
        raise ConfigError(f"heatmap {str(path)!r}: nothing was measured that could be drawn")
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'scaled-rope[eval]'") from error
    from matplotlib.figure import Figure  # without pyplot: no display, no state

    kind = path.suffix.lower().lstrip(".")
    lines = math.ceil(len(panels) / 2)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(9 if len(panels) > 1 else 5.5, 0.7 + 2.3 * lines), layout="constrained")
        draw(figure, panels)
        picture = io.BytesIO()
        figure.savefig(picture, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else {})
    write_atomic(path, picture.getvalue())
