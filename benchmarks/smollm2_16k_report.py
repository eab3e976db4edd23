"""Write what the study of SmolLM2 at 16k has measured into docs/reproduction.md, from the rows of smollm2_16k.py.

    python benchmarks/smollm2_16k_report.py                    # writes the part between the marks, and the figures
    python benchmarks/smollm2_16k_report.py --check            # exit code 1 when the page is not what the rows say
    python benchmarks/smollm2_16k_report.py --standalone DIR   # report.md and the figures there, and nothing else

Any part of the rows will do: what is not there is shown as not measured, and claims about it cannot be told.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT
from benchmarks.paper_mini_report import markdown
from benchmarks.smollm2_16k import (
    HOURS,
    KEY_LENGTHS,
    KEY_SEED,
    LENGTHS,
    LONG,
    OTHER_SEED,
    ROWS,
    RULER_LENGTHS,
    RULER_TASKS,
    RUNS,
    SHORT_TASKS,
    TEXTS,
    TRAINING,
    WORDINGS,
)
from benchmarks.smollm2_16k_claims import (
    NOT_MEASURED,
    findings,
    heldout,
    noise_lines,
    over_texts,
    paired_questions,
    signed,
)
from benchmarks.smollm2_16k_rows import (
    AGAIN,
    BASE_LINE,
    FURTHER,
    LINES,
    TRAINED_LENGTH,
    Cell,
    Study,
    planned,
    read_study,
)
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import compare
from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.files import write_atomic
from scaled_rope.report.drawing import drawing, save_figure
from scaled_rope.report.figures import GREY, PALETTE
from scaled_rope.report.page_blocks import with_block
from scaled_rope.results import Row

PAGE = ROOT / "docs" / "reproduction.md"
BEGIN, END = "<!-- smollm2-16k: python benchmarks/smollm2_16k_report.py -->", "<!-- end of smollm2-16k -->"
FIGURES = ("smollm2-16k-positions.png", "smollm2-16k-training.png")
TEXT_NAMES = {
    "novel": "a novel", "proofs": "formal mathematics", "addresses": "a speech", "recent": "documentation of 2026",
}  # fmt: skip
NO_VALUE = "–"
NOTHING = (
    f"**Nothing of this has been measured yet.** `make smollm2-16k` trains and measures it, in about {HOURS} hours on "
    "two cores; `python benchmarks/smollm2_16k.py --minutes 60` does as much as fits into an hour, and the same "
    "command goes on. `python benchmarks/smollm2_16k_report.py` then writes the results here."
)


# -------------------------------------------------------------------------------------------------------------- tables


def cell_text(study: Study, line: str, cell: Cell, shown: Callable[[Row], str]) -> str:
    """A row as text, why it failed, or that it is not there."""
    row = study.row(line, *cell)
    return shown(row) if row is not None else study.failed.get((line, cell), NOT_MEASURED)


def _table(head: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table of lines; those of which nothing is measured are named under it."""
    known, missing = [], []
    for line, values in lines:
        if all(value in (NOT_MEASURED, NO_VALUE) for value in values):
            missing.append(LINES[line])
        else:
            known.append([LINES[line], *values])
    said = f"Not measured: {'; '.join(missing)}." if missing else ""
    return "\n\n".join(filter(None, [markdown(head, known) if known else "", said]))


def perplexity_table(study: Study, text: str) -> str:
    """Perplexity within each range of positions."""
    starts = [0, *LENGTHS]
    heads = [f"{start}–{end}" for start, end in zip(starts, LENGTHS, strict=False)]
    cells = [("perplexity", text, length, False) for length in LENGTHS]
    return _table(
        ["", *heads],
        ((line, [cell_text(study, line, cell, lambda row: f"{row['perplexity_bucket']:.2f}") for cell in cells])
         for line in _lines_with(cells[-1])),
    )  # fmt: skip


def control_table(study: Study, text: str, other: str | None) -> str:
    """The change beyond the trained length against a control, by position: of the same weights (None), or of a line."""

    def change(line: str, lengths: Sequence[int]) -> str:
        pairs = []
        for length in lengths:
            mine = study.row(line, "perplexity", text, length, False)
            cut = study.row(other or line, "perplexity", text, length, True)
            if mine is None or cut is None:
                return NOT_MEASURED
            pairs.append((mine, cut))
        found = compare(pairs)
        return NOT_MEASURED if found is None else found.short

    groups = [*([length] for length in FURTHER), list(FURTHER)]
    heads = [f"{start}–{end}" for start, end in zip([TRAINED_LENGTH, *FURTHER], FURTHER, strict=False)]
    lines = _lines_with(("perplexity", text, LONG, False))
    return _table(["", *heads, "all"], ((line, [change(line, group) for group in groups]) for line in lines))


_TEXTS_OF_AN_INTERVAL = 3
"""Student's interval of two values says nothing: it reaches a dozen times as far as they lie apart."""


def over_texts_table(study: Study) -> str:
    """The change beyond the trained length over all texts, against three others."""

    def said(ratios: dict[str, float]) -> str:
        found = over_texts(ratios)
        if found is None or len(ratios) >= _TEXTS_OF_AN_INTERVAL:
            return NOT_MEASURED if found is None else found.percent()
        return ", ".join(f"{signed(100 * math.expm1(ratio))} % ({text})" for text, ratio in ratios.items())

    lines = []
    for line in LINES:
        against = [(line, True), (BASE_LINE, True), ("none", False), ("none", True)]
        values = [
            NO_VALUE if line == other == "none" and place > 1 else said(study.log_ratios(line, other, control=cut))
            for place, (other, cut) in enumerate(against)
        ]
        lines.append((line, values))
    unscaled = "training without scaling"
    head = ["", "against itself, cut", "against the base, cut", f"against {unscaled}", f"against {unscaled}, cut"]
    return _table(head, lines)


def keys_table(study: Study) -> str:
    """Keys found by wording and length, with Wilson's interval of both wordings together."""

    def found(line: str, length: int) -> str:
        rows = [study.row(line, "passkey", wording, length, KEY_SEED) for wording in WORDINGS]
        if all(row is None for row in rows):
            return study.failed.get((line, ("passkey", WORDINGS[0], length, KEY_SEED)), NOT_MEASURED)
        each = " + ".join("?" if row is None else f"{row['right']}/{row['n']}" for row in rows)
        measured = [row for row in rows if row is not None]
        low, high = wilson_interval(sum(row["right"] for row in measured), sum(row["n"] for row in measured))
        return f"{each} ({100 * low:.0f}–{100 * high:.0f} %)"

    return _table(["", *map(str, KEY_LENGTHS)], ((line, [found(line, n) for n in KEY_LENGTHS]) for line in LINES))


def _share(row: Row) -> str:
    interval = row.get("interval")
    return f"{row['value']:.0f} %" + (f" ({interval[0]:.0f}–{interval[1]:.0f})" if interval else "")


def ruler_table(study: Study) -> str:
    cells: list[Cell] = [("ruler", task, length) for task in RULER_TASKS for length in RULER_LENGTHS]
    heads = [f"{task}, {length}" for _, task, length in cells]
    planned_lines = _lines_with(cells[0])
    return _table(
        ["", *heads], ((line, [cell_text(study, line, one, _share) for one in cells]) for line in planned_lines)
    )


def short_table(study: Study) -> str:
    """Short tasks: the score, and the difference to the base on the same questions."""
    lines = []
    for line in _lines_with(("short", SHORT_TASKS[0])):
        values = []
        for task in SHORT_TASKS:
            text = cell_text(study, line, ("short", task), _share)
            paired = paired_questions(study, line, task=task) if line != BASE_LINE else None
            values.append(text if paired is None else f"{text}, {paired.points().rpartition(', ')[0]}")
        both = paired_questions(study, line) if line != BASE_LINE else None
        last = NO_VALUE if line == BASE_LINE else NOT_MEASURED if both is None else both.points()
        lines.append((line, [*values, last]))
    return _table(["", *SHORT_TASKS, "both, against the base"], lines)


def longppl_table(study: Study) -> str:
    def said(row: Row) -> str:
        ends = row.get("interval")
        value = "no key tokens" if row["longppl"] is None else f"{row['longppl']:.2f}"
        return value + (f" ({ends[0]:.2f}–{ends[1]:.2f})" if ends else "") + f", {row['key_tokens']} key tokens"

    cell: Cell = ("longppl", LONG)
    return _table(
        ["", f"LongPPL, {LONG}"], ((line, [cell_text(study, line, cell, said)]) for line in _lines_with(cell))
    )


def _lines_with(cell: Cell) -> list[str]:
    """The lines for which a cell is planned."""
    return [line for line in LINES if any(line == one and cell in found for (one, _), found in planned().items())]


def training_table(study: Study) -> str:
    """Held-out perplexity at the start (the base under the scaling of the run), after half the steps and at the end."""
    lines = []
    for run in RUNS:
        row = study.runs.get(run.name)
        scaling = run.recipe("out").scaling
        start = study.row(f"base {scaling}", "perplexity", "novel", LONG, False)
        values = [NOT_MEASURED] * 5
        if row is not None:
            half, end = (heldout(study, run.name, part) for part in (0.5, 1.0))
            values = [
                NOT_MEASURED if start is None else f"{start['perplexity']:.2f}",
                *(NOT_MEASURED if value is None else f"{value:.2f}" for value in (half, end)),
                f"{row['losses'][0]:.3f} to {row['losses'][-1]:.3f}",
                f"{row['tokens'] / 1e6:.2f} M in {row['seconds'] / 60:.0f} min",
            ]
        lines.append((run.name, values))
    return _table(["", "start", "half", "end", "loss of the first and last step", "tokens and time"], lines)


# ---------------------------------------------------------------------------------------------------------------- page


def progress(study: Study) -> str:
    """How much of the plan is there, and what of it is not."""
    missing, done = [], 0
    for (line, kind), cells in planned().items():
        there = [(line, cell) in study.cells or (line, cell) in study.failed for cell in cells]
        done += all(there)
        if not all(there):
            some = f" ({sum(there)} of {len(cells)})" if any(there) else ""
            missing.append(f"{kind} of {LINES[line]}{some}")
    text = f"{len(study.runs)} of {len(RUNS)} runs are trained, and {done} of {done + len(missing)} measurements made."
    if missing:
        text += (
            f"\n\n<details>\n<summary>Not measured yet: {len(missing)}</summary>\n\n{'; '.join(missing)}\n\n</details>"
        )
    return text


def block(study: Study, figures: Sequence[str] = ()) -> str:
    """The part of the page between the marks.

    figures: names of those that are drawn.
    """
    if study.is_empty:
        return NOTHING
    verdicts = [[one.claim, one.evidence, f"**{one.verdict}** ({one.why})"] for one in findings(study)]
    parts = [
        progress(study),
        _origin(study),
        markdown(["claim", "measured", "verdict"], verdicts),
        "Of perplexities the estimate is the mean over texts of the log ratio at positions 8192 to 16384, with "
        "Student's interval over the texts; of keys and questions the difference over the same prompts, with a paired "
        "bootstrap. “Seeds” is what two trainings may differ by that differ in the seed alone, from the runs that have "
        "a second one. A claim holds if the whole interval is on its side and the estimate is above that.",
        *_pictures(figures),
        "### Training, and held-out perplexity",
        "On one window of the novel, 16384 tokens. The start is the base under the run's scaling.",
        training_table(study),
        "### Perplexity beyond 8192 positions",
        "Change over all texts at positions 8192 to 16384; “cut” is the same tokens predicted from the last 8192 only.",
        over_texts_table(study),
        *(part for text in TEXTS for part in _text_parts(study, text)),
        "### Passkeys and needles",
        f"Found of those asked, {' + '.join(WORDINGS)}, with the 95 % interval of both together.",
        keys_table(study),
        _again(study),
        "### RULER",
        ruler_table(study),
        "### Short tasks",
        "Right answers, and the difference to the base on the same questions in points, with 95 % intervals.",
        short_table(study),
        "### LongPPL",
        "On the novel; key tokens are those that the base under YaRN predicts by what stands further back than 4096 "
        "tokens. They are chosen by its own gain, so its own number is low by the choice, and not to be compared. "
        "Where they are few, one of them can decide.",
        longppl_table(study),
        "### What a second seed changes",
        markdown(["", "perplexity at 8192 to 16384, seed 1 over seed 2", "keys beyond 8192, seed 1 less seed 2"],
                 noise_lines(study)),
    ]  # fmt: skip
    parts += [f"Note: {note}." for note in study.notes]
    return "\n\n".join(filter(None, parts))


def _origin(study: Study) -> str:
    commits = ", ".join(f"{commit} ({count} rows)" for commit, count in study.commits().items())
    return f"Commits: {commits}. Machine: {', '.join(study.devices())}."


def _pictures(figures: Sequence[str]) -> list[str]:
    titles = dict(
        zip(FIGURES, ("Perplexity by position on each text", "Loss by step, and held-out perplexity"), strict=True)
    )
    return [f"![{titles[name]}](images/{name})" for name in figures]


def _text_parts(study: Study, text: str) -> list[str]:
    tables = [
        ("Perplexity by position", perplexity_table(study, text)),
        ("Against the same weights that read the last 8192 tokens", control_table(study, text, None)),
        ("Against the base that reads the last 8192 tokens", control_table(study, text, BASE_LINE)),
    ]
    body = "\n\n".join(f"{title}:\n\n{table}" for title, table in tables)
    return [f"<details>\n<summary>By position: {TEXT_NAMES[text]}</summary>\n\n{body}\n\n</details>"]


def _again(study: Study) -> str:
    """The two cells that were measured with other prompts."""
    line = RUNS[0].name
    said = [
        f"{wording} {cell_text(study, line, cell, lambda row: '{right}/{n}'.format(**row))}, with seed {KEY_SEED} "
        f"{cell_text(study, line, ('passkey', wording, LONG, KEY_SEED), lambda row: '{right}/{n}'.format(**row))}"
        for (_, wording, _, _), cell in zip(AGAIN, AGAIN, strict=True)
    ]
    return f"{LINES[line]} at {LONG}, other prompts (seed {OTHER_SEED}): {'; '.join(said)}."


# ------------------------------------------------------------------------------------------------------------- figures


def drawable(study: Study) -> list[str]:
    """The names of the figures that there are rows for."""
    found = [FIGURES[0]] if any(cell[0] == "perplexity" for _, cell in study.cells) else []
    return found + ([FIGURES[1]] if study.runs else [])


def draw(study: Study, folder: Path) -> list[str]:
    """Draw the figures that there are rows for; return their names."""
    names = drawable(study)
    for name, make in zip(FIGURES, (_draw_positions, _draw_training), strict=True):
        if name in names:
            make(study, folder / name)
    return names


def _style(line: str) -> dict[str, object]:
    """Scalings have colors, seeds and the untrained base have line styles."""
    family = {"yarn": 0, "base yarn:2": 0, "pi": 1, "base linear:2": 1, "none": 2, "pose": 3}
    name = line.removesuffix("-2")
    color = GREY[0] if name == BASE_LINE else PALETTE[family[name]][0]
    return {"color": color, "ls": ":" if line.startswith("base ") else "--" if line != name else "-"}


_HIGHEST = 3


def _draw_positions(study: Study, path: Path) -> None:
    """A panel per text: perplexity by position, and the base's control in black.

    Curves that rise above `_HIGHEST` times the control leave their panel: they would press the others together.
    """
    with drawing() as pyplot:
        figure, grid = pyplot.subplots(2, 2, figsize=(8.5, 6.2), sharex=True)
        middles = {end: (start + end) / 2 for start, end in zip([0, *LENGTHS], LENGTHS, strict=False)}
        handles: dict[str, object] = {}
        for axes, text in zip(grid.flat, TEXTS, strict=True):
            for line, title in LINES.items():
                rows = {n: study.row(line, "perplexity", text, n, False) for n in LENGTHS}
                points = [(middles[n], row["perplexity_bucket"]) for n, row in rows.items() if row is not None]
                if points:
                    (curve,) = axes.plot(*zip(*points, strict=True), marker="o", ms=3, **_style(line))
                    handles.setdefault(title, curve)
            cut = {n: study.row(BASE_LINE, "perplexity", text, n, True) for n in FURTHER}
            points = [(middles[n], row["perplexity_bucket"]) for n, row in cut.items() if row is not None]
            if points:
                (curve,) = axes.plot(*zip(*points, strict=True), color="black", lw=1, marker="x", ms=4)
                handles.setdefault("the base, last 8192 tokens only", curve)
            axes.axvline(TRAINED_LENGTH, color=GREY[0], lw=0.8, ls=":")
            axes.set(title=TEXT_NAMES[text], yscale="log")
            highest = _HIGHEST * max((value for _, value in points), default=math.inf)
            if axes.get_ylim()[1] > highest:
                axes.set_ylim(top=highest)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
            if not axes.lines[:-1]:
                axes.text(0.5, 0.5, NOT_MEASURED, transform=axes.transAxes, ha="center")
                axes.set(yscale="linear", yticks=[])
        for axes in grid[-1]:  # a label of the figure would stand in the legend
            axes.set_xlabel("position (middle of the range, tokens)")
        figure.supylabel("perplexity", fontsize=9)
        if handles:
            figure.legend(handles.values(), handles, loc="outside lower center", ncol=3)
        save_figure(figure, path)
        pyplot.close(figure)


def _draw_training(study: Study, path: Path) -> None:
    """Loss by step, and held-out perplexity at the extended length."""
    with drawing() as pyplot:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.5, 3.4))
        for run in RUNS:
            row = study.runs.get(run.name)
            if row is None:
                continue
            steps = range(1, len(row["losses"]) + 1)
            left.plot(steps, row["losses"], marker="o", ms=3, label=LINES[run.name], **_style(run.name))
            start = study.row(f"base {run.recipe('out').scaling}", "perplexity", "novel", LONG, False)
            points = {0: None if start is None else start["perplexity"]}
            points |= {int(step): found.get(str(LONG)) for step, found in row["heldout"].items()}
            known = [(step, value) for step, value in points.items() if value is not None]
            if known:
                right.plot(*zip(*known, strict=True), marker="o", ms=3, **_style(run.name))
        left.set(xlabel="step", ylabel="loss (nats per token)", title="training")
        right.set(xlabel="step", ylabel="perplexity", yscale="log", title=f"held-out novel, {LONG} tokens")
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter("{x:g}")
        left.legend()
        save_figure(figure, path)
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/smollm2_16k_report.py", __doc__)
    parser.add_argument("--rows", type=Path, default=ROOT / ROWS, help="default: %(default)s")
    parser.add_argument("--training", type=Path, default=ROOT / TRAINING, help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    parser.add_argument("--images", type=Path, default=ROOT / "docs" / "images", help="default: %(default)s")
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--standalone", type=Path, metavar="DIR", help="write report.md and the figures there alone")
    args = parser.parse_args(argv)
    study = read_study(args.rows, args.training)
    if args.standalone is not None:
        text = block(study, draw(study, args.standalone / "images"))
        write_atomic(args.standalone / "report.md", text + "\n")
        print(args.standalone / "report.md")
        return 0
    if not args.page.is_file():
        raise ConfigError(f"page {args.page}: does not exist")
    page = args.page.read_text(encoding="utf-8")
    content = block(study, drawable(study)).strip()
    wanted = with_block(page, BEGIN, END, f"\n\n{content}\n\n", args.page.name)
    if args.check:
        missing = [name for name in drawable(study) if not (args.images / name).is_file()]
        if wanted != page or missing:
            print(f"{args.page} shows other rows than {args.rows}; run python benchmarks/smollm2_16k_report.py")
        return int(wanted != page or bool(missing))
    draw(study, args.images)
    write_atomic(args.page, wanted)
    print(f"{args.page}: {len(study.runs)} runs, {len(study.cells)} rows")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
