"""Tables and plots of the rows that benchmarks/gpu.py wrote, for docs/performance.md.

python benchmarks/gpu_report.py            # rewrites the part of the page between its two markers
python benchmarks/gpu_report.py --check    # exit code 1 when the page is not what the rows say
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.report.page_blocks import with_block
from scaled_rope.results import Row, rows_so_far

ROWS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- rows of benchmarks/gpu.py: begin -->", "<!-- rows of benchmarks/gpu.py: end -->"
NONE = (
    "No row from a GPU exists yet, because no GPU was available. Nothing on this page about speed on a GPU is measured."
)


def newest(rows: Sequence[Row]) -> list[Row]:
    """Keep the last row of each measurement on each card; one that had no time left hides none that is measured."""
    names = ("metric", "device", "shape", "model", "tokens", "variant", "kernel", "dtype")
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        # Which attention ran is a result where variants have names of their own.
        key = (*(row.get(name) for name in names), None if "variant" in row else row.get("attention"))
        if key not in found or row.get("skipped") != NO_TIME:
            found[key] = row
    return list(found.values())


Text = Callable[[Row], str]
NO_TIME = "no time left"
MODEL_METRICS = ("attention", "prefill", "training step", "sweep")
GOALS = {
    "rotary forward": "0.9 of a copy from T = 32k on, ahead of every rival",
    "rotary backward": "0.9 of a copy from T = 32k on, ahead of every rival",
    "decode": "within 10 % of static decoding",
    "training step": "MFU of 0.45 for 1B at 32k",
}
"""The goals that the rows will be held to."""


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
    used = "" if row.get("mfu") is None else f", {100 * row['mfu']:.0f} %"
    return f"{row['tokens_per_second'] / 1e3:.1f}k{used}, {row['peak_bytes'] / 2**30:.1f} GiB"


def report(rows: Sequence[Row]) -> str:
    """The content between the markers: what is ahead, then tables, for each card by itself."""
    if not rows:
        return NONE
    return "\n\n".join(part for device in devices(rows) for part in report_of(device, rows))


def devices(rows: Sequence[Row]) -> list[str]:
    return sorted({str(row["device"]) for row in rows})


def report_of(device: str, rows: Sequence[Row]) -> list[str]:
    """The paragraphs and tables about one card, whose rows are compared with each other and with no other card's."""
    rows = [row for row in rows if row["device"] == device]
    parts = []
    for driver, torch, commit in sorted(
        {(str(row["driver"]), row["versions"]["torch"], str(row["commit"])) for row in rows}
    ):
        parts.append(f"Measured on one {device}, driver {driver}, torch {torch}, commit {commit}.")
    if wrong := [
        row for row in rows if row["metric"] == "correctness" and "skipped" in row and row["skipped"] != NO_TIME
    ]:
        names = "; ".join(f"{row['variant']}, {row['shape']}, {row['dtype']}: {row['skipped']}" for row in wrong)
        parts.append(f"**Not right, or not run: {names}.**")
    if checked := [row for row in rows if row["metric"] == "correctness" and "skipped" not in row]:
        parts.append(f"{len(checked)} cases of kernels agree with float64 to the rounding of their dtype.")
    pairs = against_rivals(rows)
    if pairs:
        parts += [standing(pairs), "**Ours beside the best rival**", rival_table(pairs)]
    for metric in ("rotary forward", "rotary backward", "decode"):
        for shape in dict.fromkeys(row["shape"] for row in rows if row["metric"] == metric):
            chosen = [row for row in rows if row["metric"] == metric and row["shape"] == shape]
            parts.append(f"**{metric.capitalize()}, {shape}**: bandwidth, share of a copy of as many bytes")
            parts.append(table(chosen, line_of, rotary_cell))
    for metric in MODEL_METRICS:
        for what in dict.fromkeys(map(subject, (row for row in rows if row["metric"] == metric))):
            chosen = [row for row in rows if row["metric"] == metric and subject(row) == what]
            parts.append(f"**{metric.capitalize()}, {what}**: tokens/s, share of the peak rate, peak memory")
            parts.append(table(chosen, line_of, model_cell))
    return parts


Pair = tuple[Row, Row]
"""The best row of ours and that of its best rival, for one metric, shape or model, and length."""


def against_rivals(rows: Sequence[Row]) -> list[Pair]:
    """Pairs of what was timed, in the order of the rows: of the same card, metric, subject and length."""
    cases: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "seconds" in row and row["metric"] in (*GOALS, *MODEL_METRICS):
            cases.setdefault((row["device"], row["metric"], subject(row), row["tokens"]), []).append(row)
    found = []
    for group in cases.values():
        ours, rivals = ([row for row in group if is_ours(row) == wanted] for wanted in (True, False))
        if ours and rivals:
            found.append((min(ours, key=seconds), min(rivals, key=seconds)))
    return found


def is_ours(row: Row) -> bool:
    return str(row["variant"]).startswith("ours") if "variant" in row else row["kernel"] == "triton"


def seconds(row: Row) -> float:
    return float(row["seconds"])


def standing(pairs: Sequence[Pair]) -> str:
    """One line: what is ahead of its best rival and what is not. Differences within the quartiles are neither."""

    def name(ours: Row) -> str:
        return f"{ours['metric']} of {subject(ours)} at {length(ours)}"

    ahead = [name(ours) for ours, rival in pairs if upper(ours) < lower(rival)]
    behind = [
        f"{name(ours)} ({ours['seconds'] / rival['seconds']:.2f}×)"
        for ours, rival in pairs
        if lower(ours) > upper(rival)
    ]
    even = len(pairs) - len(ahead) - len(behind)
    return (
        f"Ahead: {', '.join(ahead) or 'nothing'}. Behind: {', '.join(behind) or 'nothing'}. Within the spread: {even}."
    )


def lower(row: Row) -> float:
    return float(row.get("seconds_quartiles", [row["seconds"]])[0])


def upper(row: Row) -> float:
    return float(row.get("seconds_quartiles", [row["seconds"]])[-1])


def rival_table(pairs: Sequence[Pair]) -> str:
    lines = ["| | ours | best rival | time of ours / rival's | reached | goal |", "|---|---|---|---|---|---|"]
    for ours, rival in pairs:
        what = f"{ours['metric']}, {subject(ours)}, {length(ours)}"
        times = [f"{line_of(row)}, {row['seconds'] * 1e6:,.1f} µs" for row in (ours, rival)]
        reached = f"{100 * ours['share_of_copy']:.0f} % of a copy" if "share_of_copy" in ours else "–"
        if ours.get("mfu") is not None:
            reached = f"MFU {ours['mfu']:.2f}"
        quotient = f"{ours['seconds'] / rival['seconds']:.2f}×"
        lines.append(
            f"| {what} | {times[0]} | {times[1]} | {quotient} | {reached} | {GOALS.get(ours['metric'], '–')} |"
        )
    return "\n".join(lines)


def roofline(rows: Sequence[Row], path: Path) -> Path | None:
    """Draw how near kernels come to this card's own limits, a panel per card.

    Bytes/s over bytes, with the copy as a line, and FLOP/s as a share of a large matrix product's. None without
    matplotlib or rows.
    """
    shown = [row for row in rows if "seconds" in row and ("share_of_copy" in row or row.get("matmul_flops_per_second"))]
    if not shown:
        return None
    try:
        import matplotlib
    except ImportError:
        print("not drawn: pip install matplotlib")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    cards = devices(shown)
    figure, axes = pyplot.subplots(len(cards), 2, figsize=(11, 4 * len(cards)), layout="constrained", squeeze=False)
    for (left, right), card in zip(axes, cards, strict=True):
        here = [row for row in shown if row["device"] == card]
        moved = [row for row in here if "share_of_copy" in row]
        for metric in dict.fromkeys(row["metric"] for row in moved):
            for mine, marker in ((True, "o"), (False, "x")):
                of = [row for row in moved if row["metric"] == metric and is_ours(row) == mine]
                points = [(row["bytes"], row["bytes_per_second"] / 1e12) for row in of]
                if points:
                    left.scatter(
                        *zip(*points, strict=True),
                        marker=marker,
                        s=18,
                        label=f"{metric}, {'ours' if mine else 'others'}",
                    )
        copies = sorted({(row["bytes"], row["bytes"] / row["copy_seconds"] / 1e12) for row in moved})
        if copies:
            left.plot(*zip(*copies, strict=True), color="black", lw=1, label="copy of as many bytes")
        left.set(xscale="log", xlabel="bytes read and written", ylabel="TB/s", title=card)
        counted = [row for row in here if row.get("matmul_flops_per_second") and "flops" in row]
        names = [f"{row['metric']}, {subject(row)}, {length(row)}, {line_of(row)}" for row in counted]
        shares = [row["flops"] / row["seconds"] / row["matmul_flops_per_second"] for row in counted]
        right.barh(names, shares, color=["C0" if is_ours(row) else "C7" for row in counted])
        right.axvline(1, color="black", lw=1)
        right.tick_params(axis="y", labelsize=6)
        right.set(xlabel="FLOP/s, as a share of a large bf16 matrix product's", xlim=(0, 1.05))
        left.legend(fontsize=6) if left.get_legend_handles_labels()[0] else None
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def replaced(page: str, content: str) -> str:
    return with_block(page, BEGIN, END, f"\n\n{content}\n\n", PAGE.name)


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
        panels = list(dict.fromkeys((row["device"], subject(row)) for row in chosen))
        if not panels:
            continue
        figure, axes = pyplot.subplots(
            1, len(panels), figsize=(4 * len(panels), 3.6), layout="constrained", squeeze=False
        )
        for axis, panel in zip(axes[0], panels, strict=True):
            here = [row for row in chosen if (row["device"], subject(row)) == panel]
            for name in dict.fromkeys(map(line_of, here)):
                points = sorted((row["tokens"], row[field]) for row in here if line_of(row) == name)
                scale = 1e12 if field == "bytes_per_second" else 1e3
                axis.plot([t for t, _ in points], [value / scale for _, value in points], marker="o", ms=3, label=name)
            if field == "bytes_per_second":
                copies = sorted({(row["tokens"], row["bytes"] / row["copy_seconds"] / 1e12) for row in here})
                axis.plot(*zip(*copies, strict=True), color="black", ls=":", label="copy")
            axis.set(xscale="log", xlabel="T (tokens)", ylabel=unit, title=f"{panel[1]}\n{panel[0]}")
            axis.grid(alpha=0.3)
            axis.legend(fontsize=6)
        path = folder / f"gpu-{metric.replace(' ', '-')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        drawn.append(path)
    if (path := roofline(rows, folder / "gpu-roofline.png")) is not None:
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
    parser.add_argument(
        "--standalone", type=Path, metavar="DIR", help="write gpu_report.md and the roofline there alone"
    )
    args = parser.parse_args(argv)
    rows = newest(rows_so_far(args.rows))
    if args.standalone is not None:
        drawn = roofline(rows, args.standalone / "gpu-roofline.png")
        picture = f"\n\n![{drawn.name}]({drawn.name})" if drawn else ""
        write_atomic(args.standalone / "gpu_report.md", report(rows) + picture + "\n")
        print(f"{args.standalone / 'gpu_report.md'}: {len(rows)} rows")
        return 0
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
