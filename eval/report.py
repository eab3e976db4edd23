"""Tables, plots and a verdict from result rows.

    python eval/report.py out/demo/rows.jsonl --output out/demo --verdict demo --train-log out/demo/train_log.jsonl

prints the tables and writes `report.html`, one page that needs no other file and no network, with a PNG of each plot
beside it. With `--verdict demo` the exit code is 1 when the claim of the demo doesn't hold.
"""

from __future__ import annotations

import html
import io
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaled_rope.config import RopeScaling
from scaled_rope.errors import ConfigError, Parser, run_cli
from scaled_rope.evaluation import format_perplexity, format_table
from scaled_rope.loading import display_name
from scaled_rope.methods import compute_rope
from scaled_rope.results import Row, read_rows, row_key, write_atomic

# Okabe and Ito's palette, without the two that vanish on black or on white; the unscaled model gets the ink's grey.
PALETTE = ("#e69f00", "#56b4e9", "#cc79a7", "#009e73", "#d55e00", "#0072b2")
GREY = "#8a8a8a"
MARKERS = "osD^vPX*"
TOLERANCE = 1.10


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Series:
    """The rows of one model under one scaling; `metrics[metric][length]` is a row."""

    model: str
    label: str
    scaling: RopeScaling
    carried: bool
    head_dim: int
    metrics: dict[str, dict[int, Row]] = field(default_factory=dict)
    name: str = ""
    """What plots and tables call it: the label, with the model where labels alone would be ambiguous."""
    color: str = GREY
    marker: str = "o"

    def rows(self, metric: str) -> dict[int, Row]:
        return self.metrics.get(metric, {})


def current_rows(rows: Sequence[Row]) -> list[Row]:
    """The rows that describe the present: of each model and metric, those that agree with the last one appended.

    A file that is appended to keeps what was measured before weights, dtype, text or protocol changed; such rows must
    not share a line with new ones.
    """

    def state(row: Row) -> tuple[str, ...]:
        protocol = {name: value for name, value in row["protocol"].items() if name != "bucket_start"}
        text = row["data"]["fingerprint"] if row["metric"] == "perplexity" else ""
        return row["model_fingerprint"], row["dtype"], text, str(sorted(protocol.items()))

    latest = {(row["model"], row["metric"]): state(row) for row in rows}
    return [row for row in rows if state(row) == latest[row["model"], row["metric"]]]


def load_series(paths: Sequence[str], finetuned: str | None = None) -> list[Series]:
    """All series in the row files, in order of appearance; the model `finetuned` is named so.

    Raises:
        ConfigError: no rows, or perplexities over different texts, which cannot share a table.
    """
    found = list({row_key(row): row for path in paths for row in read_rows(path)}.values())
    if not found:
        raise ConfigError(f"no rows in {', '.join(paths)}")
    try:
        rows = current_rows(found)
    except KeyError as error:
        raise ConfigError(
            f"a row has no field {error}; rows come from eval/perplexity.py and eval/passkey.py"
        ) from error
    if len(rows) < len(found):
        print(f"note: {len(found) - len(rows)} rows of older weights, texts or protocols are left out", file=sys.stderr)
    series: dict[tuple[str, str], Series] = {}
    try:
        texts = {row["data"]["fingerprint"] for row in rows if row["metric"] == "perplexity"}
        for row in rows:
            scaling = RopeScaling.from_dict(row["scaling"])
            label = row["label"].replace("(checkpoint)", "(fine-tuned)") if row["model"] == finetuned else row["label"]
            new = Series(row["model"], label, scaling, row["carried"], row["head_dim"])
            one = series.setdefault((row["model"], label), new)
            one.metrics.setdefault(row["metric"], {})[row["length"]] = row
    except KeyError as error:
        raise ConfigError(
            f"a row has no field {error}; rows come from eval/perplexity.py and eval/passkey.py"
        ) from error
    if len(texts) > 1:
        raise ConfigError(f"the rows hold perplexities over {len(texts)} different texts; report them one at a time")
    found_series = list(series.values())
    labels = [one.label for one in found_series]
    colors = iter(PALETTE * (1 + len(labels) // len(PALETTE)))
    for index, one in enumerate(found_series):
        one.name = one.label if labels.count(one.label) == 1 else f"{display_name(one.model)}, {one.label}"
        one.color = GREY if one.scaling.method == "default" else next(colors)
        one.marker = MARKERS[index % len(MARKERS)]
    return found_series


def contexts(series: Sequence[Series]) -> tuple[int | None, int | None]:
    """The trained and the extended context length (tokens) that the series have in common, None where they differ."""
    trained = {one.scaling.original_max_position_embeddings for one in series}
    extended = {one.scaling.max_position_embeddings for one in series if one.scaling.factor > 1}
    return (trained.pop() if len(trained) == 1 else None, extended.pop() if len(extended) == 1 else None)


# ---------------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class Verdict:
    holds: bool
    line: str


def _only(what: str, candidates: Sequence[Series]) -> Series:
    if len(candidates) != 1:
        names = ", ".join(f"{display_name(one.model)} {one.label}" for one in candidates) or "none"
        raise ConfigError(f"verdict: exactly one series must be {what}; found: {names} (see --base, --finetuned)")
    return candidates[0]


def demo_verdict(series: Sequence[Series], base: str | None = None, finetuned: str | None = None) -> Verdict:
    """Whether fine-tuning with YaRN extended the context.

    1. The fine-tuned model's perplexity in the position bucket that ends at its extended context is at most 1.10 times
       the unscaled base's in its own trained context.
    2. It is below position interpolation and NTK-aware scaling without fine-tuning in every bucket beyond that.

    Args:
        base: the model that is read without fine-tuning; default: the one with unscaled rows.
        finetuned: the model that carries its scaling; default: the only one that does.

    Raises:
        ConfigError: a row that the claim needs is missing.
    """
    scored = [one for one in series if one.rows("perplexity")]
    unscaled = [one for one in scored if one.scaling.method == "default" and base in (None, one.model)]
    reference = _only("the unscaled base", unscaled)
    carried = [one for one in scored if one.carried and one.scaling.method != "default"]
    tuned = _only("the fine-tuned model under its own scaling", [o for o in carried if finetuned in (None, o.model)])
    rivals = [
        _only(f"the base under static {method}", [o for o in scored if o.model == reference.model and _is(o, method)])
        for method in ("linear", "ntk")
    ]
    trained, target = reference.scaling.original_max_position_embeddings, tuned.scaling.max_position_embeddings
    first, last = _bucket(reference, trained), _bucket(tuned, target)
    share = last / first
    line = (
        f"{tuned.label} at {target} tokens (bucket {_span(tuned, target)}): {last:.2f}, "
        f"{share:.2f}x the unscaled base within its {trained} tokens ({first:.2f}; allowed {TOLERANCE:.2f}x)"
    )
    beyond = [length for length in sorted(tuned.rows("perplexity")) if length > (trained or 0)]
    if not beyond:
        raise ConfigError(f"verdict: {tuned.name} has no perplexity beyond {trained} tokens; evaluate it there")
    margins = [(_bucket(rival, n) / _bucket(tuned, n), rival, n) for n in beyond for rival in rivals]
    worst, rival, length = min(margins, key=lambda margin: margin[0])
    line += (
        f"; {'below' if worst > 1 else 'NOT below'} PI and NTK-aware in {'all' if worst > 1 else 'some of the'} "
        f"{len(beyond)} buckets beyond (closest: {_bucket(tuned, length):.2f} against {_bucket(rival, length):.2f} "
        f"of {rival.label}, {_span(rival, length)})"
    )
    holds = share <= TOLERANCE and worst > 1
    return Verdict(holds, f"{'PASS' if holds else 'FAIL'}: {line}")


def _is(series: Series, method: str) -> bool:
    return series.scaling.method == method and not series.scaling.dynamic


def _bucket(series: Series, length: int | None) -> float:
    """Perplexity in the position bucket that ends at `length`; infinite when it overflowed."""
    row = series.rows("perplexity").get(length or 0)
    if row is None:
        raise ConfigError(f"verdict: {series.name} has no perplexity at length {length}; evaluate it there")
    return math.inf if row["perplexity_bucket"] is None else float(row["perplexity_bucket"])


def _span(series: Series, length: int | None) -> str:
    low, high = series.rows("perplexity")[length or 0]["bucket"]
    return f"{low}-{high}"


# ----------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    title: str
    note: str
    header: list[str]
    lines: list[tuple[Series, list[tuple[str, Row | None]]]]

    def text(self) -> str:
        lines = [[series.name, *(text for text, _ in cells)] for series, cells in self.lines]
        return f"{self.title}\n{format_table(self.header, lines)}"


def tables(series: Sequence[Series]) -> list[Table]:
    """Every table for which there are rows."""

    def table(metric: str, title: str, note: str, column: Callable[[Row], str], cell: Callable[[Row], str]) -> None:
        columns = {length: column(row) for one in series for length, row in one.rows(metric).items()}
        lines: list[tuple[Series, list[tuple[str, Row | None]]]] = []
        for one in series:
            if rows := one.rows(metric):
                found = [rows.get(length) for length in sorted(columns)]
                lines.append((one, [("", None) if row is None else (cell(row), row) for row in found]))
        if lines:
            made.append(Table(title, note, ["", *(columns[length] for length in sorted(columns))], lines))

    made: list[Table] = []
    table(
        "perplexity",
        "Perplexity by position bucket",
        "Tokens between two positions. Buckets differ in text: compare down the columns.",
        lambda row: f"{row['bucket'][0]}-{row['bucket'][1]}",
        lambda row: format_perplexity(row["perplexity_bucket"]),
    )
    table(
        "perplexity",
        "Perplexity by context length",
        "All tokens of the first L.",
        lambda row: str(row["length"]),
        lambda row: format_perplexity(row["perplexity"]),
    )
    table(
        "passkey",
        "Passkeys found by context length",
        "Right of all, every token of the key greedily.",
        lambda row: str(row["length"]),
        lambda row: f"{row['right']}/{row['n']}",
    )
    return made


# ------------------------------------------------------------------------------------------------------------ plots

# Each plot is drawn once for the page, in a color that is then replaced by the page's own text color so that it
# follows light and dark mode, and once for the PNG.
_PAGE_INK, _PNG_INK = "#0a0b0c", "#222222"

Draw = Callable[[Any], None]


def pyplot(ink: str) -> Any:
    """matplotlib without a display, in one color of ink on nothing.

    Raises:
        ConfigError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("the report needs matplotlib: pip install 'scaled-rope[eval]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcdefaults()
    colors = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")
    matplotlib.rcParams.update(dict.fromkeys(colors, ink))
    matplotlib.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "font.size": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.2,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
        }
    )
    return pyplot


def render(name: str, draw: Draw, size: tuple[float, float], folder: Path) -> str:
    """Write NAME.png into `folder` and give the SVG element for the page.

    Args:
        draw: draws on the figure it is given.
        size: width and height in inches.
    """
    buffers = {}
    for kind, ink in (("svg", _PAGE_INK), ("png", _PNG_INK)):
        plt = pyplot(ink)
        figure = plt.figure(figsize=size)
        draw(figure)
        buffers[kind] = io.BytesIO()
        background = {"transparent": True, "metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}
        figure.savefig(buffers[kind], format=kind, **background)
        plt.close(figure)
    write_atomic(folder / f"{name}.png", buffers["png"].getvalue())
    svg = buffers["svg"].getvalue().decode()
    svg = svg[svg.index("<svg") :].replace(_PAGE_INK, "currentColor")
    # Several drawings share the page, so their ids must differ; their size is the page's business.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    opening, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest


def _mark_contexts(axis: Any, line: Callable[..., Any], trained: int | None, extended: int | None) -> None:
    """Mark the trained and the extended context on one axis of a plot."""
    for length, style in ((trained, ":"), (extended, "--")):
        if length is not None:
            line(length, color=GREY, linestyle=style, linewidth=1, zorder=0)


def draw_perplexity(series: Sequence[Series], trained: int | None, extended: int | None) -> Draw:
    """Perplexity of each position bucket, at the bucket's end."""

    def draw(figure: Any) -> None:
        from matplotlib import ticker

        axes = figure.subplots()
        for one in series:
            rows = sorted(one.rows("perplexity").items())
            ends = [length for length, _ in rows]
            values = [row["perplexity_bucket"] or math.nan for _, row in rows]
            tuned = one.carried and one.scaling.method != "default"
            style = {"color": one.color, "marker": one.marker, "markersize": 5, "linewidth": 2.6 if tuned else 1.4}
            axes.plot(ends, values, label=one.name, **style)
        axes.set(xscale="log", yscale="log", xlabel="end of position bucket (tokens)", ylabel="perplexity")
        ticks = sorted({length for one in series for length in one.rows("perplexity")})
        axes.set_xticks(ticks[:: max(1, len(ticks) // 8)], [str(t) for t in ticks[:: max(1, len(ticks) // 8)]])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.tick_params(axis="y", which="both", labelsize=10)
        axes.grid(which="both", axis="y")
        _mark_contexts(axes, axes.axvline, trained, extended)
        figure.legend(loc="outside lower center", ncols=2, fontsize=10)

    return draw


def draw_passkey(series: Sequence[Series]) -> Draw:
    """A panel per series: share of keys found by length (across) and depth (down)."""
    lengths = sorted({length for one in series for length in one.rows("passkey")})
    bins = min(5, min(row["n"] for one in series for row in one.rows("passkey").values()))

    def draw(figure: Any) -> None:
        panels = figure.subplots(math.ceil(len(series) / 2), 2, squeeze=False, sharex=True, sharey=True)
        for axes, one in zip(panels.flat, series, strict=False):
            rows = one.rows("passkey")
            grid = [[_found(rows.get(length), depth, bins) for length in lengths] for depth in range(bins)]
            shares = [[right / n if n else math.nan for right, n in line] for line in grid]
            axes.pcolormesh(shares, cmap="cividis", vmin=0, vmax=1)
            for y, line in enumerate(grid):
                for x, (right, n) in enumerate(line):
                    color = "#111111" if n and right / n > 0.5 else "#eeeeee"
                    text = f"{right}/{n}" if n else ""
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9, color=color)
            axes.set_title(one.name, fontsize=11)
            axes.set(xlim=(0, len(lengths)), ylim=(bins, 0))
            axes.set_xticks([x + 0.5 for x in range(len(lengths))], [str(length) for length in lengths], fontsize=9)
            axes.set_yticks(
                [y + 0.5 for y in range(bins)], [f"{(y + 0.5) / bins:.0%}" for y in range(bins)], fontsize=9
            )
            axes.tick_params(length=0)
            for spine in axes.spines.values():
                spine.set_visible(False)
        for axes in panels.flat[len(series) :]:
            axes.remove()
        figure.supxlabel("prompt length (tokens)", fontsize=11)
        figure.supylabel("depth of the key", fontsize=11)

    return draw


def _found(row: Row | None, depth: int, bins: int) -> tuple[int, int]:
    """Right answers and prompts of one bin of depths."""
    prompts = row["prompts"] if row else []
    inside = [prompt for prompt in prompts if min(int(prompt["depth"] * bins), bins - 1) == depth]
    return sum(prompt["right"] for prompt in inside), len(inside)


def draw_wavelengths(series: Sequence[Series], trained: int | None, extended: int | None) -> Draw:
    """Wavelength of each rotated pair of dimensions; scalings with the same frequencies share a curve."""

    def draw(figure: Any) -> None:
        curves: dict[tuple[float, ...], list[Series]] = {}
        for one in series:
            length = extended if one.scaling.is_length_dependent else None
            inv_freq, _ = compute_rope(one.scaling, one.head_dim, seq_len=length)
            curves.setdefault(tuple((2 * math.pi / inv_freq.double()).tolist()), []).append(one)
        axes = figure.subplots()
        for wavelengths, members in curves.items():
            names = list(dict.fromkeys(one.scaling.label for one in members))
            names = [f"{name} at {extended}" if name.startswith("dynamic") else name for name in names]
            axes.plot(wavelengths, color=members[0].color, linewidth=1.8, label=", ".join(names))
        axes.set(yscale="log", xlabel="pair of dimensions", ylabel="wavelength (tokens)")
        axes.grid(axis="y")
        _mark_contexts(axes, axes.axhline, trained, extended)
        right = max(map(len, curves)) - 1
        for length, name in ((trained, "trained"), (extended, "extended")):
            if length is not None:
                axes.text(right, length * 1.1, f"{name} context, {length}", fontsize=9, ha="right")
        figure.legend(loc="outside lower center", ncols=1, fontsize=10)

    return draw


def draw_loss(losses: Sequence[tuple[int, float]]) -> Draw:
    """Training loss by optimizer step."""

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot(*zip(*losses, strict=True), color=PALETTE[4], linewidth=1.5)
        axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        axes.grid(axis="y")

    return draw


def read_losses(path: str) -> list[tuple[int, float]]:
    """Step and loss from JSON lines with these two fields, or from comma-separated losses.

    Raises:
        ConfigError: the file is missing or is neither.
    """
    try:
        text = Path(path).read_text().strip()
        if text.startswith("{"):
            return [(int(row["step"]), float(row["loss"])) for row in read_rows(path)]
        return list(enumerate(map(float, text.replace("\n", ",").split(",")), start=1))
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"train-log {path!r} holds no losses: {error}") from error


# ------------------------------------------------------------------------------------------------------------- page

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --soft: #6b6b70; --line: #d9d9de; --paper: #fff; --good: #00795a;
  --bad: #b8450b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --soft: #a0a0a6; --line: #3a3a3e; --paper: #161618;
  --good: #2fc39a; --bad: #ff8a4a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 46rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.1rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; } .note, figcaption { color: var(--soft); font-size: .875rem; }
.verdict { border: 2px solid var(--tone); border-radius: .5rem; padding: .75rem 1rem; }
.verdict b { color: var(--tone); }
figure { margin: .5rem 0; } svg { display: block; width: 100%; height: auto; color: var(--ink); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td { cursor: help; } thead th { color: var(--soft); font-weight: normal; }
i { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .4em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: .4rem;
  padding: .6rem .8rem; font-size: .8125rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .875rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
"""


def _about(series: Series, row: Row) -> str:
    """Where one number comes from, for its tooltip."""
    record = row["provenance"]
    parts = [f"{series.model}, {series.label}, {row['length']} tokens, {row['dtype']}"]
    if row["metric"] == "passkey":
        parts.append(
            f"{row['right']} of {row['n']}, 95 % interval {row['interval'][0]:.0%} to {row['interval'][1]:.0%}"
        )
    else:
        parts.append(f"{row['targets']} targets in {row['data']['windows']} windows of {row['data']['name']}")
    parts.append(f"commit {(record['commit'] or 'unknown')[:12]}, {record['device']}, {record['date']}")
    return "; ".join(parts)


def _html_table(table: Table) -> str:
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in table.header)
    body = []
    for series, cells in table.lines:
        line = f'<th scope=row><i style="background:{series.color}"></i>{html.escape(series.name)}</th>'
        for text, row in cells:
            title = f' title="{html.escape(_about(series, row))}"' if row else ""
            line += f"<td{title}>{html.escape(text)}</td>"
        body.append(f"<tr>{line}</tr>")
    return (
        f"<h2>{html.escape(table.title)}</h2><p class=note>{html.escape(table.note)}</p><div class=scroll>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _html_provenance(series: Sequence[Series]) -> str:
    rows = [row for one in series for cells in one.metrics.values() for row in cells.values()]
    records = [row["provenance"] for row in rows]
    dates = sorted(record["date"] for record in records)
    versions = dict.fromkeys(f"{name} {v}" for record in records for name, v in record["versions"].items() if v)
    facts: Mapping[str, str] = {
        "models": ", ".join(dict.fromkeys(f"{row['model']} ({row['model_fingerprint']})" for row in rows)),
        "code": ", ".join(dict.fromkeys(record["commit"] or "not under version control" for record in records)),
        "machine": ", ".join(dict.fromkeys(f"{record['device']}, {record['cpu_count']} CPUs" for record in records)),
        "versions": ", ".join(versions),
        "measured": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}",
        "seeds": ", ".join(dict.fromkeys(str(r["seed"]) for r in records if r["seed"] is not None)) or "nothing drawn",
    }
    items = "".join(f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())
    commands = "\n".join(dict.fromkeys(record["command"] for record in records))
    return f"<h2>Where the numbers come from</h2><dl>{items}</dl><pre>{html.escape(commands)}</pre>"


def build_page(
    series: Sequence[Series], folder: Path, title: str, verdict: Verdict | None, losses: Sequence[tuple[int, float]]
) -> str:
    """The whole page; writes the plots' PNG files into `folder`."""
    scored = [one for one in series if one.rows("perplexity")]
    asked = [one for one in series if one.rows("passkey")]
    trained, extended = contexts(series)
    lines = "Dotted: trained context; dashed: extended context." if trained else ""
    plots: list[tuple[str, str, str, Draw, tuple[float, float]]] = []
    if scored:
        caption = f"Perplexity of the tokens in each position bucket, both axes logarithmic; lower is better. {lines}"
        draw = draw_perplexity(scored, trained, extended)
        plots.append(("perplexity", "Perplexity along the context", caption, draw, (6, 5)))
    if asked:
        caption = "Share of five-digit keys found; yellow is all, dark blue none."
        height = 0.6 + 1.6 * math.ceil(len(asked) / 2)
        plots.append(("passkey", "Passkeys by length and depth", caption, draw_passkey(asked), (6, height)))
    caption = f"One full turn of each pair of rotated dimensions. {lines} Longer waves never turn fully in the context."
    draw = draw_wavelengths(series, trained, extended)
    plots.append(("wavelengths", "Wavelength per dimension", caption, draw, (6, 5.4)))
    if losses:
        plots.append(("loss", "Training loss", f"{len(losses)} optimizer steps.", draw_loss(losses), (6, 3.4)))
    figures = [
        f'<h2>{heading}</h2><figure role=img aria-label="{heading}">{render(name, draw, size, folder)}'
        f"<figcaption>{caption}</figcaption></figure>"
        for name, heading, caption, draw, size in plots
    ]
    box = ""
    if verdict is not None:
        word, line = verdict.line.split(": ", 1)
        tone = "good" if verdict.holds else "bad"
        box = f'<p class=verdict style="--tone:var(--{tone})"><b>{word}</b>: {html.escape(line)}</p>'
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>{box}"
        f"{''.join(figures)}{''.join(map(_html_table, tables(series)))}{_html_provenance(series)}</html>\n"
    )


def build_parser() -> Parser:
    parser = Parser("eval/report.py", __doc__ or "")
    add = parser.add_argument
    add("rows", nargs="+", metavar="ROWS", help="row files of eval/perplexity.py and eval/passkey.py")
    add("--output", required=True, metavar="FOLDER", help="report.html and the plots go here")
    add("--title", default="Context extension, measured", help="heading of the page (default %(default)r)")
    add("--verdict", choices=("demo",), help="decide a claim; exit code 1 when it doesn't hold")
    add("--base", metavar="MODEL", help="the model without fine-tuning (default: the one with unscaled rows)")
    add("--finetuned", metavar="MODEL", help="the fine-tuned model (default: the one that carries a scaling)")
    add("--train-log", metavar="FILE", help="losses: JSON lines with step and loss, or comma-separated")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    series = load_series(args.rows, args.finetuned)
    losses = read_losses(args.train_log) if args.train_log else []
    verdict = demo_verdict(series, args.base, args.finetuned) if args.verdict else None
    folder = Path(args.output)
    page = build_page(series, folder, args.title, verdict, losses)
    write_atomic(folder / "report.html", page)
    for table in tables(series):
        print(f"\n{table.text()}")
    print(f"\nreport: {folder / 'report.html'}")
    if verdict is not None:
        print(verdict.line)
    return 0 if verdict is None or verdict.holds else 1


if __name__ == "__main__":
    sys.exit(run_cli(main))
