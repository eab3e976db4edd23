"""Tables and plots of the rows that benchmarks/gpu.py wrote, for docs/performance.md.

python benchmarks/gpu_report.py            # rewrites the part of the page between its two markers
python benchmarks/gpu_report.py --check    # exit code 1 when the page is not what the rows say
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.results import Row, rows_so_far, write_atomic

ROWS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- rows of benchmarks/gpu.py: begin -->", "<!-- rows of benchmarks/gpu.py: end -->"
NONE = (
    "No row from a GPU exists yet, because no GPU was available. Nothing on this page about speed on a GPU is measured."
)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Keep only the last row of each measurement."""
    names = ("metric", "device", "shape", "model", "tokens", "variant", "attention", "kernel")
    return list({tuple(row.get(name) for name in names): row for row in rows}.values())


Text = Callable[[Row], str]


def table(rows: Sequence[Row], label: Text, cell: Text) -> str:
    """A table in Markdown: a row per label in the order in which they come, a column per length, ascending."""
    columns = list(dict.fromkeys(map(length, sorted(rows, key=lambda row: row["tokens"]))))
    cells = {(label(row), length(row)): cell(row) for row in rows}
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(map(label, rows)):
        lines.append(f"| {name} | " + " | ".join(cells.get((name, one), "–") for one in columns) + " |")
    return "\n".join(lines)


def length(row: Row) -> str:
    tokens = row["tokens"]
    return f"T = {tokens // 1024}k" if tokens % 1024 == 0 and tokens < 2**20 else f"T = {tokens:,}"


def rotary_cell(row: Row) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    if row["bytes"] < 2**24:
        return f"{row['seconds'] * 1e6:.1f} µs"
    return f"{row['bytes_per_second'] / 1e12:.2f} TB/s, {100 * row['share_of_copy']:.0f} %"


def model_cell(row: Row) -> str:
    if "skipped" in row:
        return str(row["skipped"])
    used = "" if row["mfu"] is None else f", {100 * row['mfu']:.0f} %"
    return f"{row['tokens_per_second'] / 1e3:.1f}k{used}, {row['peak_bytes'] / 2**30:.1f} GiB"


def report(rows: Sequence[Row]) -> str:
    """The content between the markers."""
    if not rows:
        return NONE
    parts = []
    machines = sorted({(row["device"], row["driver"], row["versions"]["torch"], str(row["commit"])) for row in rows})
    for device, driver, torch, commit in machines:
        parts.append(f"Measured on one {device}, driver {driver}, torch {torch}, commit {commit}.")
    for metric in ("rotary forward", "rotary backward", "decode"):
        for shape in dict.fromkeys(row["shape"] for row in rows if row["metric"] == metric):
            chosen = [row for row in rows if row["metric"] == metric and row["shape"] == shape]
            parts.append(f"**{metric.capitalize()}, {shape}**: bandwidth, share of a copy of as many bytes")
            parts.append(table(chosen, line_of, rotary_cell))
    for metric in ("attention", "prefill", "training step"):
        for what in dict.fromkeys(map(subject, (row for row in rows if row["metric"] == metric))):
            chosen = [row for row in rows if row["metric"] == metric and subject(row) == what]
            parts.append(f"**{metric.capitalize()}, {what}**: tokens/s, share of the peak rate, peak memory")
            parts.append(table(chosen, line_of, model_cell))
    return "\n\n".join(parts)


def replaced(page: str, content: str) -> str:
    before, found, rest = page.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise ConfigError(f"page: has no part between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{content}\n\n{END}{after}"


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Bandwidth and tokens per second against T, a file per metric; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("not drawn: pip install matplotlib")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    for metric, field, unit in (
        ("rotary forward", "bytes_per_second", "TB/s of q and k, read and written"),
        ("rotary backward", "bytes_per_second", "TB/s of q and k, read and written"),
        ("attention", "tokens_per_second", "thousand tokens/s of a layer"),
        ("prefill", "tokens_per_second", "thousand tokens/s"),
        ("training step", "tokens_per_second", "thousand tokens/s"),
    ):
        chosen = [row for row in rows if row["metric"] == metric and field in row]
        panels = list(dict.fromkeys(map(subject, chosen)))
        if not panels:
            continue
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            here = [row for row in chosen if subject(row) == panel]
            for name in dict.fromkeys(map(line_of, here)):
                points = sorted((row["tokens"], row[field]) for row in here if line_of(row) == name)
                scale = 1e12 if field == "bytes_per_second" else 1e3
                axis.plot([t for t, _ in points], [value / scale for _, value in points], marker="o", ms=3, label=name)
            if field == "bytes_per_second":
                copies = sorted({(row["tokens"], row["bytes"] / row["copy_seconds"] / 1e12) for row in here})
                axis.plot(*zip(*copies, strict=True), color="black", ls=":", label="copy")
            axis.set(xscale="log", xlabel="T (tokens)", ylabel=unit, title=panel)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
        path = folder / f"gpu-{metric.replace(' ', '-')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        drawn.append(path)
    return drawn


def subject(row: Row) -> str:
    """The thing that was measured: a shape of heads or a model."""
    return str(row.get("shape") or row["model"])


def line_of(row: Row) -> str:
    """The name of a row among others of its metric."""
    return str(row["variant"]) if "variant" in row else f"{row['attention']}, kernel {row['kernel']}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/gpu_report.py", __doc__)
    parser.add_argument("--rows", type=Path, default=ROWS, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    rows = newest(rows_so_far(args.rows))
    if not args.page.exists():
        raise ConfigError(f"page {args.page}: does not exist")
    page = args.page.read_text(encoding="utf-8")
    images = [] if args.check else plot(rows, args.images)
    names = [path.name for path in images]
    if args.check:
        names = [path.name for path in sorted(args.images.glob("gpu-*.png"))] if rows else []
    shown = "".join(f"\n\n![{name}](images/{name})" for name in sorted(names))
    wanted = replaced(page, report(rows) + shown)
    if args.check:
        return int(wanted != page)
    write_atomic(args.page, wanted)
    print(f"{args.page}: {len(rows)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
