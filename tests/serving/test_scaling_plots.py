"""Plots of scalings, and the figures of docs/methods.md."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from scaled_rope import METHODS
from scaled_rope.cli import main
from scaled_rope.serving.scaling_plots import regimes
from tests.helpers import ROOT
from tests.helpers.published_configs import PUBLISHED, written


def test_regimes():
    assert regimes([1.0, 0.9, 2.0, 8.0, math.inf], 8.0) == ["kept", "raised", "blended", "interpolated", "stopped"]
    assert regimes([1.0, 3.0], 1.0) == ["kept", "changed"]


def test_plots(tmp_path: Path):
    path = written(tmp_path, PUBLISHED["Yarn-Llama-2-7b-64k"][0])
    assert main(["inspect", str(path), "--plot", str(tmp_path / "a.svg")]) == 0
    assert main(["inspect", str(path), "--plot", str(tmp_path / "b.png")]) == 0
    svg = (tmp_path / "a.svg").read_text()
    for text in ("L = 4096", "L' = 65536", "kept", "blended", "interpolated", "yarn x16", "unscaled"):
        assert f">{text}</text>" in svg
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


DOCS = ROOT / "docs" / "methods.md"
FIGURES = ROOT / "docs" / "images" / "methods"


def texts(path: Path) -> list[str]:
    """What is written in an SVG, in order."""
    return re.findall(r"<text[^>]*>(.*?)</text>", path.read_text(), re.DOTALL)


def test_every_method_has_a_section_and_a_figure():
    text = DOCS.read_text()
    sections = re.findall(r"^### `(.+)`", text, re.MULTILINE)
    assert sections == list(METHODS)
    drawn = ["overview", *(name for name, row in METHODS.items() if row.kind == "frequency"), "resonance"]
    assert re.findall(r"\(images/methods/(.+)\.svg\)", text) == drawn
    assert sorted(path.name for path in FIGURES.iterdir()) == sorted(f"{name}.svg" for name in drawn)
    parts = dict(zip(sections, re.split(r"^### `.+`.*$", text, flags=re.MULTILINE)[1:], strict=True))
    for name, row in METHODS.items():
        for field in dataclasses.fields(row.params_type) if row.params_type else ():
            assert f"`{field.name}`" in parts[name], f"{field.name} of {name} is not documented"
        assert ("no dynamic form" in parts[name]) == bool(row.no_dynamic), name


@pytest.mark.slow
def test_the_figures_can_be_drawn_again(tmp_path: Path):
    command = re.search(r"^scaled-rope methods --figures docs/images/methods(.*)$", DOCS.read_text(), re.MULTILINE)
    assert command is not None
    assert main(["methods", "--figures", str(tmp_path), *command[1].split()]) == 0
    for path in sorted(FIGURES.iterdir()):
        assert texts(tmp_path / path.name) == texts(path), path.name
    assert len(list(tmp_path.iterdir())) == len(list(FIGURES.iterdir()))
