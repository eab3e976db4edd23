"""The paper in miniature: which runs and evaluations it is made of, and what is said of their rows.

`benchmarks/paper_mini.py` does what is planned here. A run is a recipe (`configs/demo.yaml`) with other values; its
folder is named after them, so rows say by their `model` what they belong to.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scaled_rope.errors import ConfigError
from scaled_rope.recipes import Recipe, is_finished, read_recipe
from scaled_rope.results import Row

ROOT = Path("out/paper-mini/runs")
RECIPE = "demo"
STEPS = 60
LEARNING_RATE = 3.0e-4
LENGTHS = "256,512,1024,1536,2048,3072,4096"

# Two-sided 95 % points of Student's t, by degrees of freedom.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class Run:
    """One fine-tuning run of the miniature."""

    scaling: str
    seed: int
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE

    @property
    def name(self) -> str:
        """The folder's name: scaling, steps, seed, and the learning rate where it is not the usual one."""
        rate = "" if self.learning_rate == LEARNING_RATE else f"-lr{self.learning_rate:g}"
        return f"{re.sub('[:,=]', '-', self.scaling)}-{self.steps}-s{self.seed}{rate}"

    @property
    def model(self) -> str:
        """The checkpoint that it ends with."""
        return str(ROOT / self.name / "model")

    def recipe(self) -> Recipe:
        """The recipe of the demo with this run's values; a tenth of the steps are warm-up, as there."""
        changed: dict[str, Any] = {"scaling": self.scaling, "seed": self.seed, "output_dir": str(ROOT / self.name)}
        if self.steps != STEPS:
            changed |= {"max_train_steps": self.steps, "warmup_steps": max(1, self.steps // 10)}
        if self.learning_rate != LEARNING_RATE:
            changed |= {"learning_rate": self.learning_rate}
        return read_recipe(RECIPE, changed)


#: position interpolation, NTK-aware by formula and by a theta set by hand, NTK-by-parts, YaRN; all for s = 8
TABLE1 = ("linear:8", "ntk:8", "abf:8,theta=200000", "ntk-by-parts:8", "yarn:8")
SEEDS = (1, 2, 3)
RERUN_SEED = 4
RATES = (1e-4, 3e-4, 1e-3)
SWEEP_STEPS = 30

PARTS: dict[str, tuple[Run, ...]] = {
    "sweep": tuple(Run(method, 1, SWEEP_STEPS, rate) for method in TABLE1 for rate in RATES),
    "table1": tuple(Run(method, seed) for seed in SEEDS for method in TABLE1),
    "half": tuple(Run(method, seed, STEPS // 2) for seed in SEEDS for method in TABLE1),
    "rerun": tuple(Run(method, RERUN_SEED) for method in TABLE1),
}
"""The runs of each part that trains."""


def missing(runs: Iterable[Run]) -> list[Run]:
    """Those that have not come to their end."""
    return [run for run in runs if not is_finished(run.recipe())]


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a value over seeds."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.sd:.1f}"

    @property
    def prediction(self) -> tuple[float, float]:
        """Where one more seed falls with 95 %, if values are normal: mean ± t·sd·√(1 + 1/n), n - 1 degrees of freedom.

        Raises:
            ConfigError: fewer than 2 or more than 11 values.
        """
        if self.n - 1 not in _T95:
            raise ConfigError(f"a prediction from {self.n} values is not allowed; 2 to 11")
        half = _T95[self.n - 1] * self.sd * math.sqrt(1 + 1 / self.n)
        return self.mean - half, self.mean + half


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation (n - 1 below the line; not a number for a single value)."""
    sd = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.fmean(values), sd, len(values))


def by_run(rows: Iterable[Row], field: str) -> dict[str, dict[int, float]]:
    """A run's name -> context length -> a field of its perplexity rows, read under its own scaling."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        path = Path(row["model"])
        if row["metric"] == "perplexity" and row["carried"] and path.parent.parent == ROOT:
            found.setdefault(path.parent.name, {})[row["length"]] = row[field]
    return found


def table(rows: Sequence[Row], runs: Sequence[Run], field: str = "perplexity_bucket") -> str:
    """A Markdown table: a line per scaling, a column per position bucket, mean ± standard deviation over seeds."""
    values = by_run(rows, field)
    lengths = sorted({length for run in runs for length in values.get(run.name, {})})
    if not lengths:
        raise ConfigError(f"no rows of the {len(runs)} runs; measure them first: benchmarks/paper_mini.py")
    lines = ["| scaling | seeds | " + " | ".join(f"–{length}" for length in lengths) + " |"]
    lines.append("|" + "---|" * (len(lengths) + 2))
    grouped: dict[str, list[Mapping[int, float]]] = {}
    for run in runs:
        if run.name in values:
            grouped.setdefault(run.scaling, []).append(values[run.name])
    for scaling, of in grouped.items():
        cells: list[Any] = [spread([one[length] for one in of]) for length in lengths]
        shown = [f"{cell.mean:.1f}" if cell.n == 1 else str(cell) for cell in cells]
        lines.append(f"| `{scaling}` | {len(of)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
