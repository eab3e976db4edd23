"""Shared by all figures: style, colours, and writing to files."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic

FORMATS = (".svg", ".png")
INK, GREY = "#222222", "#8a8a8a"
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
_STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify": True,
    "svg.fonttype": "none",  # text stays text: a tenth of the size
    "svg.hashsalt": "scaled-rope",  # the same picture is the same file
}


@contextmanager
def drawing(**style: Any) -> Iterator[Any]:
    """Provide pyplot without a display, in our style and with the rcParams in `style`.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'scaled-rope[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | style)
        yield pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure as SVG or PNG, by the file's suffix. The file appears whole or not at all and contains no date."""
    kind = path.suffix.lower().lstrip(".")
    picture = io.BytesIO()
    nothing: dict[str, dict[str, None]] = {"svg": dict.fromkeys(("Date", "Creator", "Format", "Type")), "png": {}}
    figure.savefig(picture, format=kind, dpi=144, metadata=nothing[kind])
    data = picture.getvalue()
    write_atomic(path, squeeze(data.decode()) if kind == "svg" else data)


def squeeze(svg: str) -> str:
    """Shrink an SVG to a third of its bytes: coordinates get two decimals of a point, fonts lose their alternatives."""
    rounded = partial(re.sub, r"\d+\.\d{3,}", lambda match: f"{float(match[0]):.2f}".rstrip("0").rstrip("."))
    svg = re.sub(r"<[^>]*>", lambda tag: rounded(tag[0]), svg)  # only inside tags, not in the picture's texts
    svg = re.sub(r"font-family: [^;\"]*", "font-family: sans-serif", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"|<metadata>.*?</metadata>', "", svg, flags=re.DOTALL)
    return re.sub(r"\s*\n\s*", "\n", re.sub(r" ?\n(?=[LMCQzZ\"])", " ", svg))


def check_format(path: Path) -> None:
    """Raise ConfigError for a file name that no picture can be written to."""
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"plot {str(path)!r}: the name must end in {' or '.join(FORMATS)}")
