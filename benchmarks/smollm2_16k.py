"""SmolLM2-135M from 8k to 16k by training on a CPU: YaRN, PI, PoSE and no scaling under one budget, with controls.

    python benchmarks/smollm2_16k.py --list          # the parts, and how far each has come
    python benchmarks/smollm2_16k.py                 # all that is missing, the most telling parts first
    python benchmarks/smollm2_16k.py --minutes 60    # as much as fits; the same command goes on
    python eval/report.py data/smollm2_16k_rows.jsonl --output out/smollm2-16k/report

Each run trains the recipe smollm2-135m-16k-cpu with other values of a few fields, on the same rows in the same order
for the same seed. Each model, and the base under three scalings, is measured by the project's own evaluators. Trained
models and their states go to --work, which may lie outside the checkout, and rows to --output and --training.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import check_names, run_prepare_commands
from benchmarks.parts import Part, run_all, show
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import Control
from scaled_rope.recipes.files import read_recipe
from scaled_rope.recipes.recipe import Recipe
from scaled_rope.recipes.runs import is_finished
from scaled_rope.results import append_row, rows_so_far

RECIPE = "smollm2-135m-16k-cpu"
BASE = "models/smollm2-135m"
ROWS, TRAINING = "data/smollm2_16k_rows.jsonl", "data/smollm2_16k_training.jsonl"
LONG = 16384


@dataclass(frozen=True)
class Run:
    """A training run: its name, and the fields of the recipe that it changes."""

    name: str
    title: str
    changes: dict[str, Any] = field(default_factory=dict)

    def recipe(self, work: str, recipe: str = RECIPE) -> Recipe:
        return read_recipe(recipe, self.changes | {"output_dir": f"{work}/{self.name}"})

    def flags(self, work: str) -> list[str]:
        """Arguments of finetune.py."""
        changed = self.changes | {"output_dir": f"{work}/{self.name}"}
        return [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]


RUNS = (
    Run("yarn", "YaRN"),
    Run("pi", "PI", {"scaling": "linear:2"}),
    Run("none", "no scaling", {"scaling": "default"}),
    Run(
        "pose",
        "YaRN, PoSE at 8k",
        {"positions": "pose", "sequence_length": 8192, "global_batch_size": 2},
    ),
    Run("yarn-2", "YaRN", {"seed": 2}),
    Run("pi-2", "PI", {"scaling": "linear:2", "seed": 2}),
)
"""In the order in which they run."""

UNTRAINED = ("default", "linear:2", "yarn:2")
"""Scalings under which the base is measured."""

TEXTS = {
    "novel": ("--dataset", "data/cache/books/heldout"),
    "proofs": ("--dataset", "standin:hol-light", "--samples", "1"),
    "addresses": ("--dataset", "standin:sotu", "--samples", "1"),
    "recent": ("--dataset", "standin:recent", "--samples", "1"),
}
"""Held-out texts, a window of each: a novel, formal mathematics, a speech, and documentation of 2026."""

LENGTHS = (2048, 4096, 8192, 10240, 12288, 14336, LONG)
BEYOND = (LONG, 24576, 32768)
"""Lengths at which YaRN's model is read with twice its factor."""
CONTROL = Control(window=8192, stride=2048)
KEY_LENGTHS, KEY_PROMPTS, KEY_SEED, OTHER_SEED = (4096, 8192, 12288, LONG), 5, 42, 43
WORDINGS = ("passkey", "needle")
RULER_TASKS, RULER_LENGTHS, RULER_PROMPTS = ("niah_single_1", "ruler_vt"), (8192, LONG), 5
SHORT_TASKS, QUESTIONS = ("arc_easy", "hellaswag"), 100
HOURS = 20
"""How long all of it takes on two cores of an EPYC without AMX, by the rates of a training and of single passes."""


def _list(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def evaluations(name: str) -> dict[str, list[str]]:
    """Kind of measurement -> arguments of its script, for the model called `name`: a run's, or "base"."""
    control = f"window={CONTROL.window},stride={CONTROL.stride}"
    found = {
        f"perplexity-{text}": ["eval/perplexity.py", *flags, "--lengths", _list(LENGTHS), "--control", control]
        for text, flags in TEXTS.items()
    }
    keys = ["eval/passkey.py", "--iterations", str(KEY_PROMPTS), "--wording", _list(WORDINGS), "--shared-prefill"]
    found["passkey"] = [*keys, "--lengths", _list(KEY_LENGTHS)]
    harness = ["eval/harness.py", "--offline", "--tasks"]
    at = ["--lengths", _list(RULER_LENGTHS), "--limit", str(RULER_PROMPTS)]
    found["ruler"] = [*harness, _list(RULER_TASKS), *at]
    found["short"] = [*harness, _list(SHORT_TASKS), "--limit", str(QUESTIONS)]
    evaluator = ["--evaluator", BASE, "--evaluator-scaling", "yarn:2", "--key-window", "4096"]
    found["longppl"] = ["eval/longppl.py", *TEXTS["novel"], *evaluator, "--lengths", str(LONG)]
    if name == "yarn":
        found["twice"] = ["eval/perplexity.py", *TEXTS["novel"], "--scaling=checkpoint:4", "--lengths", _list(BEYOND)]
    if name.endswith("-2"):  # a second seed tells the noise of training, on two texts and the keys
        kept = ("perplexity-novel", "perplexity-recent", "passkey")
        found = {kind: found[kind] for kind in kept}
    if name == "again":
        found = {"passkey": [*keys, "--lengths", str(LONG), "--seed", str(OTHER_SEED)]}
    return found


STAGES = (
    ("perplexity-novel", "perplexity-recent"),
    ("passkey", "short"),
    ("perplexity-proofs", "perplexity-addresses", "longppl"),
    ("ruler", "twice"),
)
"""Kinds of measurement in the order in which they come, all models for one stage before the next."""


def parts(work: str, rows: str, training: str, recipe: str = RECIPE) -> dict[str, Part]:
    """All parts by name, in the order in which they run: trainings with the first measurements, then the others."""
    models = {"base": (BASE, [f"--scaling={spec}" for spec in UNTRAINED])}
    train: dict[str, Part] = {}
    for run in RUNS:
        resolved = run.recipe(work, recipe)
        models[run.name] = f"{resolved.output_dir}/model", []
        command = ("finetune.py", recipe, *run.flags(work))
        train[run.name] = Part(f"train-{run.name}", command, partial(_steps, resolved))
    models["again"] = models[RUNS[0].name]
    measured = {name: _measured(name, *model, rows, training) for name, model in models.items()}
    found: list[Part] = []
    for stage in STAGES:
        for name, kinds in measured.items():
            if stage is STAGES[0] and name in train:
                found.append(train[name])
            found += [kinds[kind] for kind in stage if kind in kinds]
    return {part.name: part for part in found}


def _measured(name: str, model: str, under: Sequence[str], rows: str, training: str) -> dict[str, Part]:
    found = {}
    for kind, command in evaluations(name).items():
        progress = partial(_count, rows, training, name, kind)
        found[kind] = Part(f"{kind}-{name}", (*command, "-m", model, *under, "--output", rows), progress)
    return found


def _steps(recipe: Recipe) -> str:
    """The progress of a run."""
    log = rows_so_far(Path(recipe.output_dir) / "train_log.jsonl")
    if is_finished(recipe):
        return f"{recipe.max_train_steps} of {recipe.max_train_steps} steps, finished"
    return f"{log[-1]['step'] if log else 0} of {recipe.max_train_steps} steps"


RECORDED = (
    "scaling", "seed", "positions", "sequence_length", "max_position_embeddings", "global_batch_size",
    "max_train_steps", "warmup_steps", "learning_rate", "lr_schedule",
)  # fmt: skip
"""Fields of the recipe that a row about a run has."""
HASHES = ("model_hash", "dataset_hash")
"""Likewise from what the run recorded: the content of the base and of the training set."""


def record(recipe: Recipe, training: str) -> None:
    """Append a row about a run to `training`, once and if it is finished; its provenance is that which the run wrote.

    "weights" is the `model_fingerprint` that rows about its model have.
    """
    name, output = Path(recipe.output_dir).name, Path(recipe.output_dir)
    if not is_finished(recipe) or any(row["run"] == name for row in rows_so_far(training)):
        return
    log = rows_so_far(output / "train_log.jsonl")
    from scaled_rope.evaluation.jobs import fingerprint_of  # imports torch, which listing the parts need not wait for

    recorded = yaml.safe_load((output / "recipe.yaml").read_text())
    row = {
        "metric": "train_loss", "run": name, **{each: getattr(recipe, each) for each in RECORDED},
        **{each: recorded[each] for each in HASHES}, "weights": fingerprint_of(output / "model"),
        "losses": [one["loss"] for one in log], "tokens": log[-1]["tokens_seen"],
        "heldout": {one["step"]: one["heldout"] for one in log if "heldout" in one},
        "seconds": round(sum(one["seconds"] for one in log), 1),
        "provenance": json.loads((output / "provenance.json").read_text()),
    }  # fmt: skip
    append_row(training, row)


def _count(rows: str, training: str, name: str, kind: str) -> str:
    """How many of the planned rows of one measurement of a model are there."""
    from benchmarks.smollm2_16k_rows import count  # which imports the plan from here

    there, failed, planned = count(rows, training, name, kind)
    return f"{there} of {planned} rows" + (f", {failed} failed" if failed else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/smollm2_16k.py", __doc__)
    add = parser.add_argument
    add("--part", action="append", metavar="NAME", help="see --list; repeatable (default: all)")
    add("--list", action="store_true", help="the parts, and how far each has come")
    add("--minutes", type=float, default=1e4, metavar="N", help="stop after N (default: when all is done)")
    add("--work", default="out/smollm2-16k", metavar="FOLDER", help="trained models (default %(default)s)")
    add("--output", default=ROWS, metavar="FILE", help="rows (default %(default)s)")
    add("--training", default=TRAINING, metavar="FILE", help="losses of the runs (default %(default)s)")
    args = parser.parse_args(argv)
    if not args.minutes > 0:
        raise ConfigError(f"minutes {args.minutes} is not allowed; above 0")
    known = parts(args.work, args.output, args.training)
    check_names("part", args.part, known)
    wanted = [known[name] for name in args.part or known]
    if args.list:
        show(wanted)
        return 0
    run_prepare_commands(RECIPE)
    run_all(wanted, args.minutes)
    for run in RUNS:
        record(run.recipe(args.work), args.training)
    show(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
