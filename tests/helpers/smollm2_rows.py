"""Made-up rows of the study of SmolLM2 at 16k: every cell of its plan, with chosen outcomes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.smollm2_16k import BASE, CONTROL, HASHES, KEY_PROMPTS, LONG, QUESTIONS, RECORDED, RUNS, TEXTS
from benchmarks.smollm2_16k_rows import BEYOND, FURTHER, LENGTHS, LINES, Cell, planned
from scaled_rope.evaluation.statistics import tally
from scaled_rope.results import Row
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.token_documents import TokenSource

PERPLEXITY: dict[str, float] = {
    "base default": 60.0, "base linear:2": 45.0, "base yarn:2": 22.0, "yarn": 18.0, "yarn-2": 18.01, "pi": 25.0,
    "pi-2": 25.02, "none": 30.0, "pose": 18.05,
}  # fmt: skip
"""Line -> perplexity beyond the trained length; before it, it is 20 for all."""
KEYS: dict[str, int] = {"yarn": 5, "yarn-2": 5, "pi": 1, "pi-2": 1}
"""Line -> keys found of 5 in each cell beyond the trained length; others find none."""
RIGHT: dict[str, int] = {"base default": 60, "yarn": 61}
"""Line -> questions answered right of 100 in each short task; others 50."""
_SCALING = {run.name: str(run.recipe("work").scaling) for run in RUNS}
_UNSCALED = RopeScaling("default", original_max_position_embeddings=CONTROL.window)


def study_rows(
    perplexity: Mapping[str, float] = PERPLEXITY, keys: Mapping[str, int] = KEYS, right: Mapping[str, int] = RIGHT
) -> list[Row]:
    """A row for every planned cell."""
    return [
        _row(line, cell, perplexity[line], keys.get(line, 0), right.get(line, 50))
        for (line, _), cells in planned().items()
        for cell in cells
    ]


def training_rows(end: Mapping[str, float] | None = None) -> list[Row]:
    """A row for every run. end: a run -> its last held-out perplexity; default: that of `PERPLEXITY`."""
    found = []
    for run in RUNS:
        recipe = run.recipe("work")
        last = (end or PERPLEXITY)[run.name]
        found.append({
            "metric": "train_loss", "run": run.name, **{each: getattr(recipe, each) for each in RECORDED},
            **dict.fromkeys(HASHES, "h"), "weights": f"weights of {run.name}",
            "losses": [3.5 - 0.05 * step for step in range(recipe.max_train_steps)],
            "tokens": recipe.max_train_steps * recipe.tokens_per_step, "seconds": 2400.0,
            "heldout": {"4": {"8192": 20.0, str(LONG): last * 1.02}, "8": {"8192": 20.0, str(LONG): last}},
            "provenance": _provenance(),
        })  # fmt: skip
    return found


def write_study(folder: Path, rows: list[Row], training: list[Row]) -> tuple[Path, Path]:
    """Write both files; an empty list leaves its file out."""
    paths = folder / "rows.jsonl", folder / "training.jsonl"
    for path, some in zip(paths, (rows, training), strict=True):
        if some:
            path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return paths


def _provenance() -> Row:
    versions = {"torch": "2"}
    return {"command": "python x", "commit": "0123456789", "versions": versions, "device": "a CPU", "cpu_count": 2,
            "date": "2030-01-01", "seed": 0}  # fmt: skip


def _row(line: str, cell: Cell, value: float, keys: int, right: int) -> Row:
    run = next((run for run in RUNS if run.name == line), None)
    spec = line.removeprefix("base ") if run is None else _SCALING[line]
    if cell[0] == "twice":
        spec = "yarn:4"
    scaling = RopeScaling.from_spec(spec, _UNSCALED)
    row: Row = {
        "model": BASE if run is None else f"out/smollm2-16k/{line}/model",
        "model_fingerprint": "weights of the base" if run is None else f"weights of {line}",
        "dtype": "bfloat16", "head_dim": 64, "scaling": scaling.to_dict(), "label": scaling.label,
        "carried": spec == "default" if run is None else cell[0] != "twice", "provenance": _provenance(),
        "data": {"name": cell[0], "fingerprint": json.dumps(cell)},
        "length": {"short": None, "longppl": LONG}[cell[0]] if len(cell) == 2 else cell[2],
    }  # fmt: skip
    return row | _MEASURED[cell[0]](line, cell, value, keys, right)


def _perplexity(line: str, cell: Cell, value: float, keys: int, right: int) -> Row:
    kind, text, length = cell[:3]
    control = kind == "perplexity" and cell[3]
    lengths = list(BEYOND if kind == "twice" else LENGTHS)
    start = [0, *lengths][lengths.index(length)]
    found = 20.0 if control or length not in FURTHER else value
    # Texts differ a little in what a model makes of them, so that an interval over them has a width.
    found *= 1 + 0.002 * list(TEXTS).index(text) * (0 if control else 1)
    targets = length - start
    protocol: Row = {"name": "truncate", "bucket_start": start}
    if control:
        protocol = {"name": "last-tokens", **CONTROL.fields(), "bucket_start": start}
    return {
        "metric": "perplexity", "protocol": protocol, "bucket": [start, length],
        "data": {
            "name": TokenSource(TEXTS[text][1]).title, "fingerprint": f"{kind} {text}", "documents": 1, "windows": 1,
            "window_tokens": lengths[-1],
        },
        "perplexity": found, "perplexity_bucket": found, "bucket_targets": targets,
        "bucket_nats": [[targets * math.log(found)]],
    }  # fmt: skip


def _passkey(line: str, cell: Cell, value: float, keys: int, right: int) -> Row:
    _, wording, length, seed = cell
    count = keys if length > CONTROL.window else KEY_PROMPTS
    outcomes = [index < count for index in range(KEY_PROMPTS)]
    protocol = {"name": "teacher-forced", "iterations": KEY_PROMPTS, "depths": "grid", "seed": seed}
    prompts = [{"depth": index / 4, "distance": 9, "key": 1, "right": one} for index, one in enumerate(outcomes)]
    return {
        "metric": "passkey", "protocol": protocol | ({} if wording == "passkey" else {"wording": wording}),
        **tally(outcomes), "prompts": prompts,
    }  # fmt: skip


def _benchmark(line: str, cell: Cell, value: float, keys: int, right: int) -> Row:
    long = cell[0] == "ruler"
    outcomes = [1.0, 1.0, 0.0, 0.0, 0.0] if long else [float(index < right) for index in range(QUESTIONS)]
    share = 100 * sum(outcomes) / len(outcomes)
    protocol = {"name": "lm-eval", "task": cell[1], "version": 1, "num_fewshot": 0, "limit": len(outcomes)}
    return {
        "metric": "benchmark", "protocol": protocol | {"metric": str(cell[2]) if long else "acc_norm"}, "value": share,
        "unit": "%", "n": len(outcomes), "interval": [share - 5, share + 5], "outcomes": {cell[1]: outcomes},
    }  # fmt: skip


def _longppl(line: str, cell: Cell, value: float, keys: int, right: int) -> Row:
    return {
        "metric": "longppl", "protocol": {"window": 4096, "evaluator": "e"}, "longppl": value / 4, "key_tokens": 99,
        "data": {"name": TokenSource(TEXTS["novel"][1]).title, "fingerprint": "longppl"}, "tokens": 12288,
        "interval": [value / 5, value / 3],
    }  # fmt: skip


_MEASURED: dict[Any, Any] = {
    "perplexity": _perplexity, "twice": _perplexity, "passkey": _passkey, "ruler": _benchmark, "short": _benchmark,
    "longppl": _longppl,
}  # fmt: skip
assert set(PERPLEXITY) == set(LINES)
