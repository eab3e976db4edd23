"""The rows of the study of SmolLM2 at 16k: read, held against the plan, and looked up by model and cell.

A row counts if it is about a model of the study and measured as `smollm2_16k.evaluations` says; others are counted in
the notes. Rows that cannot stand beside each other are refused: of another recipe, text, weights or dtype.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.smollm2_16k import (
    BASE,
    BEYOND,
    CONTROL,
    HASHES,
    KEY_LENGTHS,
    KEY_PROMPTS,
    KEY_SEED,
    LENGTHS,
    LONG,
    OTHER_SEED,
    QUESTIONS,
    RECORDED,
    RULER_LENGTHS,
    RULER_PROMPTS,
    RULER_TASKS,
    RUNS,
    SHORT_TASKS,
    TEXTS,
    UNTRAINED,
    WORDINGS,
    evaluations,
)
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import CONTROL as LAST_TOKENS
from scaled_rope.evaluation.controls import compare
from scaled_rope.report.row_files import newest, read_row_files
from scaled_rope.results import Row, rows_so_far
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.token_documents import TokenSource

Cell = tuple[Any, ...]
"""A measurement of a model: ("perplexity", text, length, whether it is the control), ("twice", text, length),
("passkey", wording, length, seed), ("ruler", task, length), ("short", task), ("longppl", length)."""

TRAINED_LENGTH = CONTROL.window
FURTHER = tuple(length for length in LENGTHS if length > TRAINED_LENGTH)
"""Ends of the position buckets beyond the length that the base was trained on."""
LINES = {
    **{
        f"base {spec}": f"untrained, {name}" for spec, name in zip(UNTRAINED, ("no scaling", "PI", "YaRN"), strict=True)
    },
    **{run.name: run.title + (f", seed {run.changes['seed']}" if "seed" in run.changes else "") for run in RUNS},
}
"""Key of a line -> its title: the base under its scalings, and the runs."""
BASE_LINE, UNTRAINED_YARN = "base default", "base yarn:2"
SEED_PAIRS = tuple((run.name.removesuffix("-2"), run.name) for run in RUNS if run.name.endswith("-2"))
_UNSCALED = RopeScaling("default", original_max_position_embeddings=TRAINED_LENGTH)
_TITLES = {TokenSource(flags[1]).title: text for text, flags in TEXTS.items()}
_METRICS = ("perplexity", "passkey", "passkey_context", "benchmark", "longppl")


def _label(spec: str) -> str:
    return RopeScaling.from_spec(spec, _UNSCALED).label


_BASE_LABELS = {_label(spec): f"base {spec}" for spec in UNTRAINED}
_RECIPES = {run.name: run.recipe("out/smollm2-16k") for run in RUNS}
_OWN_LABELS = {name: _label(str(recipe.scaling)) for name, recipe in _RECIPES.items()}


def cells(kind: str) -> list[Cell]:
    """The cells of a kind of measurement, a key of `evaluations`."""
    name, _, text = kind.partition("-")
    if name == "perplexity":
        whole = [(name, text, length, False) for length in LENGTHS]
        return [*whole, *((name, text, length, True) for length in FURTHER)]
    return {
        "passkey": [("passkey", wording, length, KEY_SEED) for wording in WORDINGS for length in KEY_LENGTHS],
        "ruler": [("ruler", task, length) for task in RULER_TASKS for length in RULER_LENGTHS],
        "short": [("short", task) for task in SHORT_TASKS],
        "longppl": [("longppl", LONG)],
        "twice": [("twice", "novel", length) for length in BEYOND],
    }[name]


AGAIN: list[Cell] = [("passkey", wording, LONG, OTHER_SEED) for wording in WORDINGS]


def planned() -> dict[tuple[str, str], list[Cell]]:
    """(line, kind of measurement) -> its cells; "again" stands for the keys of another seed."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for line in LINES:
        for kind in evaluations("base" if line.startswith("base ") else line):
            found[line, kind] = cells(kind)
    return found | {(RUNS[0].name, "again"): AGAIN}


@dataclass
class Study:
    """The rows and runs that are there.

    Attributes:
        cells: (line, cell) -> its row, none that failed.
        failed: likewise -> why it could not be measured.
        runs: a run's name -> its row about training.
        notes: what was left out and why.
    """

    cells: dict[tuple[str, Cell], Row] = field(default_factory=dict)
    failed: dict[tuple[str, Cell], str] = field(default_factory=dict)
    runs: dict[str, Row] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.cells or self.failed or self.runs)

    def row(self, line: str, *cell: Any) -> Row | None:
        return self.cells.get((line, cell))

    def log_ratio(self, line: str, other: str, text: str, control: bool = False) -> float | None:
        """log of the perplexity beyond the trained length over that of another line, or of its control, on a text."""
        pairs = []
        for length in FURTHER:
            mine = self.row(line, "perplexity", text, length, False)
            others = self.row(other, "perplexity", text, length, control)
            if mine is None or others is None:
                return None
            pairs.append((mine, others))
        change = compare(pairs)
        return None if change is None or not math.isfinite(change.share) else math.log1p(change.share)

    def log_ratios(self, line: str, other: str, control: bool = False) -> dict[str, float]:
        """`log_ratio` by text, of the texts on which it was measured."""
        found = {text: self.log_ratio(line, other, text, control) for text in TEXTS}
        return {text: value for text, value in found.items() if value is not None}

    def answers(self, line: str, lengths: Iterable[int], seed: int = KEY_SEED) -> dict[str, list[float]] | None:
        """Wording and length -> 1 for each key that is found and 0 for others; None where a cell is missing."""
        found = {}
        for wording in WORDINGS:
            for length in lengths:
                row = self.row(line, "passkey", wording, length, seed)
                if row is None:
                    return None
                found[f"{wording} {length}"] = [float(one["right"]) for one in row["prompts"]]
        return found

    def outcomes(self, line: str) -> dict[str, list[float]] | None:
        """Task -> the outcome of each question of the short tasks; None where one is missing."""
        rows = [self.row(line, "short", task) for task in SHORT_TASKS]
        if any(row is None or not row.get("outcomes") for row in rows):
            return None
        return {task: values for row in rows if row is not None for task, values in row["outcomes"].items()}

    def commits(self) -> dict[str, int]:
        """Commit -> how many rows it made."""
        found: dict[str, int] = {}
        for row in (*self.cells.values(), *self.runs.values()):
            commit = str(row["provenance"].get("commit") or "unknown")
            short = commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")
            found[short] = found.get(short, 0) + 1
        return found

    def devices(self) -> list[str]:
        return list(
            dict.fromkeys(str(row["provenance"].get("device")) for row in (*self.cells.values(), *self.runs.values()))
        )


# ------------------------------------------------------------------------------------------------------------- reading


def read_study(rows: str | Path, training: str | Path) -> Study:
    """Read both files, as far as they are there.

    Raises:
        ConfigError: damaged files, or rows that cannot stand beside each other.
    """
    study = Study(runs=_read_runs(training))
    if not rows_so_far(rows):
        return study
    known, study.notes = read_row_files([str(rows)], _METRICS)
    placed: dict[tuple[str, Cell], list[Row]] = {}
    left: dict[str, int] = {}
    for row in known:
        line, cell = _line(row), _cell(row)
        if line is not None and cell is not None and cell[0] == "twice" and line != "yarn":
            line = None
        if line is None or cell is None:
            if row["metric"] != "passkey_context":
                why = "of other models or scalings" if line is None else "measured otherwise than planned"
                left[why] = left.get(why, 0) + 1
            continue
        placed.setdefault((line, cell), []).append(row)
    study.notes += [f"{count} rows are left out, {why}" for why, count in left.items()]
    _check_alike(rows, placed, study.runs)
    for key, several in placed.items():
        row = newest(several)
        if row.get("error"):
            study.failed[key] = str(row["error"])
        else:
            study.cells[key] = row
    return study


def count(rows: str | Path, training: str | Path, name: str, kind: str) -> tuple[int, int, int]:
    """How many rows there are of one kind of measurement of a model, how many that failed, and how many are planned.

    name: a run's, "base" (its scalings together), or "again" for the keys of another seed.
    """
    study = read_study(rows, training)
    lines = {"base": [line for line in LINES if line.startswith("base ")], "again": [RUNS[0].name]}.get(name, [name])
    wanted = [(line, cell) for line in lines for cell in (AGAIN if name == "again" else cells(kind))]
    return sum(one in study.cells for one in wanted), sum(one in study.failed for one in wanted), len(wanted)


def _read_runs(path: str | Path) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for row in rows_so_far(path):
        name = str(row.get("run"))
        if name not in _RECIPES:
            raise ConfigError(f"{path}: a row is about run {name!r}; the study has {', '.join(_RECIPES)}")
        if missing := [each for each in (*RECORDED, *HASHES, "weights", "tokens", "losses") if each not in row]:
            raise ConfigError(f"{path}: the row about run {name!r} has no field {missing[0]!r}; remove it")
        recipe = _RECIPES[name]
        for each in RECORDED:
            if row[each] != getattr(recipe, each):
                raise ConfigError(
                    f"{path}: run {name!r} was trained with {each} = {row[each]!r}, and the study has"
                    f" {getattr(recipe, each)!r}; train it anew, and remove the row and the run's measurements"
                )
        if (
            len(row["losses"]) != recipe.max_train_steps
            or row["tokens"] != recipe.max_train_steps * recipe.tokens_per_step
        ):
            raise ConfigError(
                f"{path}: run {name!r} has {len(row['losses'])} losses over {row['tokens']} tokens; must be"
                f" {recipe.max_train_steps} over {recipe.max_train_steps * recipe.tokens_per_step}"
            )
        if name in found and found[name] != row:
            raise ConfigError(f"{path}: two rows about run {name!r} differ; remove the one whose model is gone")
        found[name] = row
    for each, what in zip(HASHES, ("base", "training text"), strict=True):
        _one(path, f"runs of one {what}", {name: row[each] for name, row in found.items()})
    return found


def _line(row: Row) -> str | None:
    """The line that a row belongs to; None for other models and scalings.

    Raises:
        ConfigError: a run's model that carries another scaling than the run's.
    """
    label, parts = RopeScaling.from_dict(row["scaling"]).label, Path(row["model"]).parts
    if row["model"] == BASE:
        return _BASE_LABELS.get(label)
    if len(parts) < 2 or parts[-1] != "model" or parts[-2] not in _RECIPES:
        return None
    name = parts[-2]
    if row["carried"] and label != _OWN_LABELS[name]:
        raise ConfigError(
            f"a row about {row['model']} says that the model carries {label!r}; run {name!r} is for"
            f" {_OWN_LABELS[name]!r}"
        )
    if row["carried"] or (name == RUNS[0].name and label == _label("yarn:4")):
        return name
    return None


def _cell(row: Row) -> Cell | None:
    """The cell of a row; None where it was measured otherwise than planned."""
    metric, protocol, length = row["metric"], row["protocol"], row["length"]
    cell: Cell | None = None
    if metric == "perplexity" and (text := _TITLES.get(row["data"].get("name"))) is not None:
        control = protocol.get("name") == LAST_TOKENS
        as_planned = {name: protocol.get(name) for name in CONTROL.fields()} == CONTROL.fields()
        if not row["carried"] and row["model"] != BASE:
            cell = ("twice", text, length) if row["data"].get("window_tokens") == BEYOND[-1] else None
        elif row["data"].get("window_tokens") == LONG and (
            as_planned if control else protocol.get("name") == "truncate"
        ):
            cell = ("perplexity", text, length, control)
    elif metric == "passkey" and protocol.get("iterations") == KEY_PROMPTS:
        cell = ("passkey", protocol.get("wording", WORDINGS[0]), length, protocol.get("seed"))
    elif metric == "benchmark" and protocol["task"] in RULER_TASKS and protocol.get("limit") == RULER_PROMPTS:
        cell = ("ruler", protocol["task"], length)
    elif metric == "benchmark" and protocol["task"] in SHORT_TASKS and protocol.get("limit") == QUESTIONS:
        cell = ("short", protocol["task"]) if length is None else None
    elif metric == "longppl" and _TITLES.get(row["data"].get("name")) == "novel":
        cell = ("longppl", length)
    return cell if cell in _PLANNED else None


_PLANNED = {cell for found in planned().values() for cell in found}


def _check_alike(path: str | Path, placed: Mapping[tuple[str, Cell], Sequence[Row]], runs: Mapping[str, Row]) -> None:
    """Refuse rows that cannot stand beside each other."""
    texts: dict[str, dict[str, Any]] = {}
    weights: dict[str, dict[str, Any]] = {}
    dtypes: dict[str, Any] = {}
    for (line, cell), several in placed.items():
        for row in several:
            # All lengths of a text are cut from the same windows; prompts and questions are made for each cell.
            about = cell[:2] if cell[0] in ("perplexity", "twice") else cell
            name = " ".join(str(part) for part in about)
            texts.setdefault(name, {})[f"{line}: {row['data'].get('fingerprint')}"] = row["data"].get("fingerprint")
            model = "base" if line.startswith("base ") else line
            weights.setdefault(model, {})[f"{row['metric']}: {row['model_fingerprint']}"] = row["model_fingerprint"]
            dtypes[f"{line}: {row['dtype']}"] = row["dtype"]
    for name, found in texts.items():
        _one(path, f"rows on {name} with one text", found)
    for model, found in weights.items():
        known = {"training": runs[model]["weights"]} if model in runs else {}
        _one(path, f"rows about {model!r} with one set of weights", known | found)
    _one(path, "rows in one dtype", dtypes)


def _one(path: str | Path, what: str, found: Mapping[str, Any]) -> None:
    """Raise an error unless all values are the same."""
    if len(set(map(json.dumps, found.values()))) > 1:
        said = ", ".join(where if str(value) in where else f"{where}: {value}" for where, value in found.items())
        raise ConfigError(f"{path}: {what} are needed, and there are {said}; remove the rows that are out of date")
