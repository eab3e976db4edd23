"""The paper in miniature: the plan of its runs, and the tables and figures of their rows.

`benchmarks/paper_mini.py` carries out this plan. A run is a recipe (`configs/demo.yaml`) with other values; its folder
is named after them, so the `model` of a row tells which run it belongs to.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import compare
from scaled_rope.evaluation.passkey_context import passkey_context
from scaled_rope.evaluation.statistics import T95, wilson_interval
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.report.drawing import drawing, save_figure
from scaled_rope.report.figures import GREY, PALETTE
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling

ROOT = Path("out/paper-mini/runs")
BASE = "models/tiny-llama-256"
RECIPE = "demo"
STEPS = 20
"""Steps of a full run: a third of the demo's, so that all runs fit into an hour and a half on two cores."""


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of the miniature, of the base or of another run's final model."""

    scaling: str
    seed: int
    steps: int
    learning_rate: float
    start: Run | None = None

    @property
    def name(self) -> str:
        """The folder's name: scaling, steps, learning rate and seed, and what it starts from."""
        after = "" if self.start is None else f"-after-{self.start.name}"
        return f"{re.sub('[:,=]', '-', self.scaling)}-{self.steps}x{self.learning_rate:g}-s{self.seed}{after}"

    @property
    def label(self) -> str:
        """The name for a table's line that runs share which differ in the seed only."""
        return f"`{self.scaling}`" + ("" if self.start is None else f" after {self.start.label}")

    @property
    def model(self) -> str:
        """The checkpoint that it ends with."""
        return str(ROOT / self.name / "model")

    def changes(self) -> dict[str, object]:
        """The recipe's fields that it changes; a tenth of the steps are warm-up, as in the recipe."""
        return {
            "model": BASE if self.start is None else self.start.model,
            "scaling": self.scaling,
            "seed": self.seed,
            "global_batch_size": 4,
            "max_train_steps": self.steps,
            "warmup_steps": max(1, self.steps // 10),
            "learning_rate": self.learning_rate,
            "output_dir": str(ROOT / self.name),
        }

    def recipe(self) -> Recipe:
        return read_recipe(RECIPE, self.changes())

    def flags(self) -> list[str]:
        """The same changes as flags for finetune.py."""
        return [RECIPE, *(f"--{name.replace('_', '-')}={value}" for name, value in self.changes().items())]


#: position interpolation, NTK-aware by formula and by a theta set by hand, NTK-by-parts, YaRN; all for s = 8
TABLE1 = ("linear:8", "ntk:8", "abf:8,theta=200000", "ntk-by-parts:8", "yarn:8")
YARN = "yarn:8"
FORKS = ("yarn:8,ramp=rotations", "yarn:8,truncate=false")
"""Variants where paper and released code differ; these are fine-tuned too."""
FORKS_UNTRAINED = (*FORKS, "yarn:8,beta_fast=8", "yarn:8,beta_fast=16", "yarn:8,beta_slow=2", "yarn:8,beta_slow=4")
FIGURE5 = ("default", "dynamic-linear", "dynamic-ntk", "dynamic-yarn", "dynamic-yarn,dynamic_step=2")
SEEDS = (1, 2, 3)
RERUN_SEED = 4
RATES = (1e-4, 3e-4, 1e-3, 3e-3)

SWEEP = tuple(Run(method, SEEDS[0], STEPS // 2, rate) for method in TABLE1 for rate in RATES)
"""Half a run for each method and learning rate, the same batches for all."""


def swept(loss: Mapping[str, float]) -> dict[str, float]:
    """Each method's learning rate: the one with the lowest loss in the sweep.

    Args:
        loss: a run's name -> its mean training loss, over texts that it saw for the first time.

    Raises:
        ConfigError: a run of the sweep has no loss yet.
    """
    if lacking := [run.name for run in SWEEP if run.name not in loss]:
        raise ConfigError(f"part 'sweep' lacks {len(lacking)} of {len(SWEEP)} runs; run it first")
    best = {
        method: min((run for run in SWEEP if run.scaling == method), key=lambda r: loss[r.name]) for method in TABLE1
    }
    return {method: run.learning_rate for method, run in best.items()}


def parts(rates: Mapping[str, float]) -> dict[str, tuple[Run, ...]]:
    """The runs of each part that trains at the swept rates, the most important part first.

    `table2` has YaRN with s = 16 after s = 8 for half the steps, as the paper made its 128k models, and from the base
    for as many steps as both together; both see texts of 2048 = 8·256 tokens only.
    """

    def full(seed: int, method: str = YARN, steps: int = STEPS) -> Run:
        return Run(method, seed, steps, rates[method])

    half = STEPS // 2
    chained = tuple(Run("yarn:16", seed, half, rates[YARN], full(seed)) for seed in SEEDS)
    scratch = tuple(Run("yarn:16", seed, STEPS + half, rates[YARN]) for seed in SEEDS)
    return {
        "table1": tuple(full(seed, method) for seed in SEEDS for method in TABLE1),
        "table2": chained + scratch,
        "half": tuple(full(seed, method, half) for seed in SEEDS for method in TABLE1),
        "rerun": tuple(full(RERUN_SEED, method) for method in TABLE1),
        "forks": tuple(Run(fork, seed, STEPS, rates[YARN]) for seed in SEEDS for fork in FORKS),
    }


def late_losses(training: Iterable[Row]) -> dict[str, float]:
    """A run's name -> the mean of its late losses, from the rows of training."""
    return {Path(row["model"]).parent.name: row["late_loss"] for row in training}


def late_loss(losses: Sequence[float]) -> float:
    """The mean loss of the second half of the steps, in nats per token, which the sweep compares."""
    return statistics.fmean(losses[len(losses) // 2 :])


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a value over seeds."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if self.n == 1 else f"{self.mean:.1f} ± {self.sd:.1f}"

    @property
    def prediction(self) -> tuple[float, float]:
        """The 95 % range of one more seed, if values are normal: mean ± t·sd·√(1 + 1/n), n - 1 degrees of freedom.

        Raises:
            ConfigError: fewer than 2 or more than 11 values.
        """
        if self.n - 1 not in T95:
            raise ConfigError(f"a prediction from {self.n} values is not allowed; 2 to 11")
        half = T95[self.n - 1] * self.sd * math.sqrt(1 + 1 / self.n)
        return self.mean - half, self.mean + half


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (divided by n - 1; not a number for a single value)."""
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), sd, len(values))


ORIGINAL, FACTOR = 256, 8
_BASE_SCALING = RopeScaling(method="default", original_max_position_embeddings=ORIGINAL)
UNTRAINED = ("default", *TABLE1, *FORKS_UNTRAINED, *FIGURE5[1:])
"""Scalings under which the base is read without training."""
_SPECS = {RopeScaling.from_spec(spec, _BASE_SCALING).label: spec for spec in UNTRAINED}


def name_of(row: Row) -> str | None:
    """The name of a row's curve: a run's name or, for the base, its scaling; None for other rows."""
    path = Path(row["model"])
    if row["carried"] and path.parent.parent == ROOT:
        return path.parent.name
    return _SPECS.get(str(row["label"])) if row["model"] == BASE else None


def is_control(row: Row) -> bool:
    """Whether a row of perplexity has the last tokens alone in view, instead of all that stands before."""
    return row["metric"] == "perplexity" and row["protocol"]["name"] == "last-tokens"


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    first, *others = ("| " + " | ".join(line) + " |" for line in (head, *lines))
    return "\n".join([first, "|" + "---|" * len(head), *others])


@dataclass(frozen=True)
class Results:
    """The rows of the miniature, looked up by run or scaling."""

    rows: Sequence[Row]

    def perplexity(self, text: str, control: bool = False) -> dict[str, dict[int, float]]:
        """A run's name, or the base's scaling -> end of a position bucket -> perplexity within it, on one text; of the
        control, if asked for, in which the last 256 tokens alone are in view."""
        found: dict[str, dict[int, float]] = {}
        for row in self.rows:
            if row["metric"] == "perplexity" and row["data"]["name"] == text and (name := name_of(row)):
                if is_control(row) == control:
                    found.setdefault(name, {})[row["length"]] = row["perplexity_bucket"]
        return found

    def against_controls(self, text: str, runs: Sequence[Run]) -> str:
        """A table of the runs' perplexity against the two controls in percent, mean ± standard deviation over seeds:
        the base, and the run's own weights, each with the last 256 tokens alone in view.

        Raises:
            ConfigError: nothing of these runs, or of the base, was measured with its control on this text.
        """
        full, cut = self.perplexity(text), self.perplexity(text, control=True)
        runs = [run for run in runs if run.name in full and run.name in cut]
        if not runs or "default" not in cut:
            raise ConfigError(f"no controls on {text!r}; run benchmarks/paper_mini.py first")
        lengths = [length for length in sorted(cut["default"]) if length > ORIGINAL]
        lines = []
        for label in dict.fromkeys(run.label for run in runs):
            for name in ("the base", "itself"):
                of = [run.name for run in runs if run.label == label]
                beside = {run: cut["default" if name == "the base" else run] for run in of}
                cells = [spread([100 * (full[run][n] / beside[run][n] - 1) for run in of]) for n in lengths]
                lines.append([label, name, *(_signed(cell) for cell in cells)])
        return markdown(["scaling", "cut short", *_ranges([ORIGINAL, *lengths])[1:]], lines)

    def over_seeds(self, text: str, runs: Iterable[Run]) -> dict[str, dict[int, Spread]]:
        """A run's label -> end of a bucket -> mean and spread over the seeds that were measured on this text."""
        values, grouped = self.perplexity(text), dict[str, list[Mapping[int, float]]]()
        for run in runs:
            if run.name in values:
                grouped.setdefault(run.label, []).append(values[run.name])
        return {
            label: {length: spread([one[length] for one in of]) for length in sorted(of[0])}
            for label, of in grouped.items()
        }

    def table(self, text: str, runs: Sequence[Run]) -> str:
        """A line per scaling, a column per position bucket: mean ± standard deviation over seeds.

        Raises:
            ConfigError: nothing of these runs was measured on this text.
        """
        found = self.over_seeds(text, runs)
        if not found:
            raise ConfigError(f"no rows of the {len(runs)} runs on {text!r}; run benchmarks/paper_mini.py first")
        lengths = sorted({length for of in found.values() for length in of})
        lines = [[label, str(of[lengths[0]].n), *(str(of[n]) for n in lengths)] for label, of in found.items()]
        return markdown(["scaling", "seeds", *_ranges(lengths)], lines)

    def untrained(self, text: str, scalings: Sequence[str]) -> str:
        """A line per scaling of the base, without training."""
        values = self.perplexity(text)
        shown = [scaling for scaling in scalings if scaling in values]
        lengths = sorted({length for scaling in shown for length in values[scaling]})
        lines = [[f"`{s}`", *(f"{values[s][n]:.1f}" for n in lengths)] for s in shown]
        return markdown(["scaling", *_ranges(lengths)], lines)

    def predicted(self, text: str, runs: Sequence[Run], again: Sequence[Run], length: int) -> str:
        """A table of one more seed's perplexity in the bucket up to `length`, beside the others' predicted range."""
        first, more = self.over_seeds(text, runs), self.over_seeds(text, again)
        lines = []
        for label, of in more.items():
            low, high = first[label][length].prediction
            value = of[length].mean
            verdict = "inside" if low <= value <= high else "outside"
            lines.append([label, str(first[label][length]), f"{low:.1f} to {high:.1f}", f"{value:.1f}", verdict])
        return markdown(["scaling", "seeds 1 to 3", "95 % for one more", f"seed {RERUN_SEED}", ""], lines)

    def differences(self, text: str, length: int, reference: str, others: Sequence[str]) -> str:
        """A table of the base's change in perplexity up to `length` against `reference`, in percent. 95 % intervals are
        paired, see `compare`: each window is read under both scalings."""
        per: dict[str | None, dict[int, Row]] = {}
        for row in self.rows:
            if row["metric"] == "perplexity" and row["data"]["name"] == text and not is_control(row):
                per.setdefault(name_of(row), {})[row["length"]] = row
        lengths = [n for n in per[reference] if n <= length]
        lines = []
        for other in others:
            change = compare([(per[other][n], per[reference][n]) for n in lengths])
            lines.append([f"`{other}`", str(change)])
        return markdown([f"against `{reference}`", "perplexity [95 %]"], lines)

    def passkeys(self, runs: Sequence[Run], scalings: Sequence[str]) -> str:
        """A table of found keys by length, for the base under each scaling and for runs (all seeds together), and table
        5's two columns, from the accuracies over all prompts."""
        counts: dict[str, dict[int, list[int]]] = {}
        of_run = {run.name: f"{run.scaling}, fine-tuned" for run in runs}
        for row in self.rows:
            name = name_of(row) if row["metric"] == "passkey" else None
            if name in scalings or name in of_run:
                cell = counts.setdefault(of_run.get(str(name), str(name)), {}).setdefault(row["length"], [0, 0])
                cell[0] += row["right"]
                cell[1] += row["n"]
        lengths = sorted({length for of in counts.values() for length in of})
        lines = []
        for name, of in counts.items():
            context, accuracy = passkey_context({n: right / total for n, (right, total) in of.items()})
            intervals = {n: wilson_interval(*of[n]) for n in lengths}
            cells = [
                f"{of[n][0]}/{of[n][1]} ({100 * intervals[n][0]:.0f}–{100 * intervals[n][1]:.0f})" for n in lengths
            ]
            lines.append([f"`{name}`" if name in scalings else name, *cells, str(context or "none"),
                          "" if accuracy is None else f"{100 * accuracy:.0f} %"])  # fmt: skip
        return markdown(["scaling", *map(str, lengths), "passkey context", "accuracy"], lines)


def _ranges(ends: Sequence[int]) -> list[str]:
    return [f"{start}–{end}" for start, end in zip([0, *ends], ends, strict=False)]


def _signed(of: Spread) -> str:
    return f"{of.mean:+.1f}".replace("-", "−") + (" %" if of.n == 1 else f" ± {of.sd:.1f} %")


NOVEL, BIBLE = "novel", "bible"
"""The demo's held-out texts, by the names that their rows have."""


def sweep_table(training: Iterable[Row]) -> str:
    """Loss of each method at each learning rate, the chosen one in bold."""
    loss = late_losses(training)
    chosen = swept(loss)

    def cell(run: Run) -> str:
        text = f"{loss[run.name]:.3f}"
        return f"**{text}**" if run.learning_rate == chosen[run.scaling] else text

    lines = [[f"`{method}`", *(cell(run) for run in SWEEP if run.scaling == method)] for method in TABLE1]
    return markdown(["scaling", *(f"{rate:g}" for rate in RATES)], lines)


def tables(results: Results, training: Sequence[Row]) -> dict[str, str]:
    """Every table of the miniature by its title; those whose rows are still missing are left out."""
    runs = parts(swept(late_losses(training)))
    yarn = tuple(run for run in runs["table1"] if run.scaling == YARN)
    untrained = ("default", *TABLE1)
    wanted: dict[str, Callable[[], str]] = {
        "Learning rates": lambda: sweep_table(training),
        "Untrained, novel": lambda: results.untrained(NOVEL, untrained),
        "Untrained, Bible": lambda: results.untrained(BIBLE, untrained),
        "Table 1, novel": lambda: results.table(NOVEL, runs["table1"]),
        "Table 1, Bible": lambda: results.table(BIBLE, runs["table1"]),
        "Table 1 against its controls, novel": lambda: results.against_controls(NOVEL, runs["table1"]),
        "Table 1 against its controls, Bible": lambda: results.against_controls(BIBLE, runs["table1"]),
        "Half the steps, novel": lambda: results.table(NOVEL, runs["half"]),
        "Table 2, novel": lambda: results.table(NOVEL, yarn + runs["table2"]),
        "Table 5": lambda: results.passkeys(runs["table1"], untrained),
        "Figure 5, novel": lambda: results.untrained(NOVEL, FIGURE5),
        "Forks, untrained, Bible": lambda: results.differences(BIBLE, 2048, YARN, FORKS_UNTRAINED),
        "Forks, fine-tuned, novel": lambda: results.table(NOVEL, yarn + runs["forks"]),
        "Another seed, novel to 2048": lambda: results.predicted(NOVEL, runs["table1"], runs["rerun"], 2048),
    }
    found: dict[str, str] = {}
    for title, make in wanted.items():
        with suppress(ConfigError, KeyError):
            found[title] = make()
    return found


def draw(results: Results, rates: Mapping[str, float], folder: Path) -> list[Path]:
    """The figures: fine-tuned methods with a band of one standard deviation, and figure 5, on the held-out novel."""
    values = results.perplexity(NOVEL)
    trained = results.over_seeds(NOVEL, parts(rates)["table1"])
    unscaled = {"unscaled": {n: spread([value]) for n, value in values["default"].items()}}
    dynamic = {f"`{spec}`": {n: spread([x]) for n, x in values[spec].items()} for spec in FIGURE5[1:] if spec in values}
    named = {
        "paper-mini-table1.png": (unscaled | trained, FACTOR),
        "paper-mini-figure5.png": (unscaled | dynamic, None),
    }
    return [_draw(curves, factor, folder / name) for name, (curves, factor) in named.items()]


def _draw(curves: Mapping[str, Mapping[int, Spread]], factor: int | None, path: Path) -> Path:
    with drawing() as pyplot:
        figure, axes = pyplot.subplots(figsize=(6.4, 3.6))
        for (label, of), color in zip(curves.items(), (GREY, *PALETTE), strict=False):
            ends = list(of)
            middles = [(start + end) / 2 for start, end in zip([0, *ends], ends, strict=False)]
            mean = [cell.mean for cell in of.values()]
            axes.plot(middles, mean, marker="o", markersize=3, color=color[0], label=label.strip("`"))
            if all(cell.n > 1 for cell in of.values()):
                low, high = ([cell.mean + sign * cell.sd for cell in of.values()] for sign in (-1, 1))
                axes.fill_between(middles, low, high, color=color[0], alpha=0.2, linewidth=0)
        for length in (ORIGINAL, *([ORIGINAL * factor] if factor else [])):
            axes.axvline(length, color="#8a8a8a", linewidth=0.8, linestyle=":")
        axes.set(xlabel="position (middle of the bucket)", ylabel="perplexity", yscale="log")
        ticks = (30, 40, 60, 80, 100, 150, 200)
        axes.set_yticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.legend()
        save_figure(figure, path)
        pyplot.close(figure)
    return path
