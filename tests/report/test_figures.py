"""The figures of a report."""

from __future__ import annotations

from pathlib import Path

import pytest

import eval.report as report
from scaled_rope.report.figures import Canvas, Curve, _end_labels
from tests.helpers.report_rows import perplexities, write

pytest.importorskip("matplotlib")


def test_crowded_plots_have_no_bands(tmp_path: Path) -> None:
    specs = ("default", "linear:4", "ntk:4", "yarn:4", "dynamic-yarn")
    rows = [row for spec in specs for row in perplexities(spec, "t", {64: 30, 128: 40})]
    assert report.main([write(tmp_path / "rows", rows), "--output", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Bands" not in page and "95 % interval 29.00 to 32.00" in page


def test_few_curves_are_named_at_their_ends(tmp_path: Path) -> None:
    for count, direct in ((2, True), (6, False)):
        specs = ("default", "yarn:4", "linear:4", "ntk:4", "dynamic-yarn", "ntk-by-parts:4")[:count]
        rows = [row for spec in specs for row in perplexities(spec, "t", {64: 30, 128: 40})]
        folder = tmp_path / str(count)
        assert report.main([write(tmp_path / f"rows{count}", rows), "--output", str(folder)]) == 0
        page = (folder / "report.html").read_text()
        picture = page[page.index("<svg") : page.index("</svg>")]
        assert (">yarn x4<" in picture) == direct == ("curves to show" not in page)


def test_names_at_ends_do_not_overlap() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, 3.5), layout="constrained")
    axes = figure.subplots()
    ends = (70.0, 70.1, 70.2, 180.0, 60.0)
    curves = [
        Curve(str(n), f"a name of two lines, number {n}", n, [1, 2], [80, end], width=2.4) for n, end in enumerate(ends)
    ]
    axes.set(yscale="log", ylim=(60, 180))
    for curve in curves:
        axes.plot(curve.x, curve.y)
    _end_labels(axes, Canvas(), [*curves, Curve("x", "overflow", 0, [1], [float("inf")])])
    figure.canvas.draw()
    texts = [text for text in axes.texts if "name" in text.get_text()]
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert len(texts) == len(axes.texts) == len(ends)
    for lower, upper in zip(boxes, boxes[1:], strict=False):
        assert upper.y0 >= lower.y1 - 1  # pixels
    order = [text.get_text()[-1] for text in sorted(texts, key=lambda text: text.get_window_extent().y0)]
    assert order == ["4", "0", "1", "2", "3"]  # as the curves end
