"""Heat maps of found keys."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scaled_rope.errors import ConfigError
from scaled_rope.report.heatmap import Panel, save_heatmap


def test_heat_map_counts_by_depth() -> None:
    grid = [(index / 9, index % 2 == 0) for index in range(10)]
    panel = Panel("a model", {64: grid, 128: [(0.0, True), (1.0, False)], 256: []})
    assert panel.counts(64, 10) == [(1 - index % 2, 1) for index in range(10)]
    assert panel.counts(64, 5) == [(1, 2)] * 5
    assert panel.counts(128, 4) == [(1, 1), (0, 0), (0, 0), (0, 1)]
    assert panel.counts(512, 2) == [(0, 0), (0, 0)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_heat_map_is_written(tmp_path: Path, count: int) -> None:
    prompts = {n: [(index / 4, index < 3) for index in range(5)] for n in (64, 128)}
    panels = [Panel(f"model {index}", prompts) for index in range(count)]
    for name in ("map.svg", "map.png"):
        save_heatmap(tmp_path / name, panels)
    svg = (tmp_path / "map.svg").read_text()
    assert svg.count(">1/1<") == 6 * count and svg.count(">0/1<") == 4 * count  # text, not outlines
    assert all(f">model {index}<" in svg for index in range(count)) and ">128<" in svg
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    save_heatmap(tmp_path / "again.svg", panels)
    assert (tmp_path / "again.svg").read_text() == svg
    with pytest.raises(ConfigError, match="nothing was measured"):
        save_heatmap(tmp_path / "none.svg", [Panel("x", {})])
    with pytest.raises(ConfigError, match=".svg or .png"):
        save_heatmap(tmp_path / "map.pdf", panels)


def test_heat_map_of_many_lengths_names_few(tmp_path: Path) -> None:
    prompts = {2048 * n: [(0.5, True)] for n in range(1, 65)}
    save_heatmap(tmp_path / "map.svg", [Panel("x", prompts)])
    named = re.findall(r">(\d+)<", (tmp_path / "map.svg").read_text())
    assert len(named) == 8 and named[-1] == "131072"


def test_the_line_of_what_a_cut_text_would_keep(tmp_path: Path) -> None:
    def row(length: int, **more: object) -> dict[str, object]:
        depths = [index / 4 for index in range(5)]
        prompts = [{"depth": one, "distance": length * (1 - one) + 10, "right": True} for one in depths]
        return {"prompts": prompts, **more}

    rows = {64: row(64), 128: row(128), 256: row(256)}
    panel = Panel.of_rows("x", rows, 80)
    # At 128, depths 0 and ¼ are 138 and 106 tokens away and ½ is 74; the border is drawn between two prompts.
    assert panel.reach == {128: (0.25 + 0.5) / 2, 256: (0.5 + 0.75) / 2}
    assert Panel.of_rows("x", rows).reach == {} and Panel.of_rows("x", {256: row(256)}, 5).reach == {256: 1.0}
    older = {256: {"prompts": [{"depth": 0.5, "right": True}]}}
    assert Panel.of_rows("x", older, 80).reach == {}
    save_heatmap(tmp_path / "with.svg", [panel])
    save_heatmap(tmp_path / "without.svg", [Panel.of_rows("x", rows)])
    assert "orange line" in (tmp_path / "with.svg").read_text()
    assert "orange line" not in (tmp_path / "without.svg").read_text()
