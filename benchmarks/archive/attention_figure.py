"""Figure 5 of the paper for SmolLM2: perplexity by position under scalings and methods that change attention.

    python benchmarks/archive/attention_figure.py   # docs/images/smollm2-attention.png from data/smollm2_rows.jsonl

Two panels, of passes to twice and to four times the trained length. Under dynamic scaling each point is a pass of its
own, which ends there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.report.drawing import check_format, drawing, save_figure
from scaled_rope.report.figures import short_length
from scaled_rope.results import read_rows

TRAINED, FIRST = 8192, 1024
LINES = {
    "unscaled": ("unscaled", "#777777", "o"),
    "dynamic-linear": ("Dynamic-PI", "#e69f00", "v"),
    "dynamic-yarn": ("Dynamic-YaRN", "#222222", "s"),
    "yarn x4": ("YaRN ×4", "#56b4e9", "s"),
    "rerope (window=4096)": ("ReRoPE, w = 4096", "#0072b2", "D"),
    "leaky-rerope (window=4096, k=8)": ("Leaky ReRoPE, w = 4096, k = 8", "#cc79a7", "P"),
    "self-extend (group=8, window=2048)": ("Self-Extend, g = 8, w = 2048", "#d55e00", "^"),
    "dual-chunk (chunk=6144)": ("dual chunk, S = 6144", "#009e73", "X"),
}
"""Label of a row: name in the figure, colour, marker."""
TOP = 400
"""The perplexity at which lines are cut off."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/archive/attention_figure.py", __doc__ or "")
    parser.add_argument("--rows", default="data/smollm2_rows.jsonl", metavar="FILE", help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/images/smollm2-attention.png"), metavar="FILE")
    args = parser.parse_args(argv)
    check_format(args.output)
    curves: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for row in read_rows(args.rows):
        if row["metric"] == "perplexity" and row["data"]["name"] == "standin:books" and row["label"] in LINES:
            start, end = row["bucket"]
            if start or end == FIRST:  # a longer bucket that begins at 0 is another quantity
                curves.setdefault((row["data"]["window_tokens"], row["label"]), []).append(
                    (end, row["perplexity_bucket"])
                )
    if not curves:
        raise ConfigError(f"rows {args.rows!r}: hold no perplexity of SmolLM2 on standin:books")
    windows = 2 * TRAINED, 4 * TRAINED
    with drawing(**{"figure.figsize": (9.6, 4.4)}) as pyplot:
        figure, panels = pyplot.subplots(1, 2, sharey=True)
        for axes, window in zip(panels, windows, strict=True):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.axvline(TRAINED, color="#222222", linestyle=":", linewidth=1)
            ends = sorted({end for (tokens, _), points in curves.items() if tokens == window for end, _ in points})
            for label, (name, color, marker) in LINES.items():
                if points := sorted(curves.get((window, label), [])):
                    style = {"color": color, "marker": marker, "markersize": 5, "label": name}
                    axes.plot(*zip(*points, strict=True), **style)
            shown = [end for end in ends if end >= FIRST]
            axes.set_xticks(shown, [short_length(end) for end in shown])
            axes.xaxis.minorticks_off()
            axes.set_ylim(15, TOP)
            axes.set_yticks([20, 30, 50, 100, 200, 400], ["20", "30", "50", "100", "200", "400"])
            axes.yaxis.minorticks_off()
            axes.set_xlabel("end of position bucket (tokens)")
            axes.set_title(f"to {window // TRAINED} times the trained length, passes of {window} tokens")
            axes.legend(loc="upper left")
        panels[0].set_ylabel("perplexity")
        save_figure(figure, args.output)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
