"""Result rows for reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from scaled_rope import RopeScaling
from scaled_rope.results import Row, append_row

ENDS = (64, 128, 256, 512)
CURVES = {
    ("base", "default"): (40, 90, 130, 180),
    ("base", "linear:4"): (120, 110, 105, 140),
    ("base", "ntk:4"): (55, 70, 100, 150),
    ("base", "yarn:4"): (60, 62, 64, 150),
    ("base", "dynamic-yarn"): (40, 60, 64, 80),
    ("run/model", "yarn:4"): (38, 41, 42, 90),
}


def write_rows(path: Path, **changed: tuple[float, ...]) -> str:
    """Rows of the six series above; `changed` replaces the fine-tuned curve ("tuned") or a base curve by method."""
    base = RopeScaling("default", original_max_position_embeddings=64)
    provenance = {"command": "python x", "commit": None, "versions": {}, "device": "cpu", "cpu_count": 1}
    for (model, spec), curve in CURVES.items():
        tuned = model != "base"
        scaling = RopeScaling.from_spec(spec, base)
        shared = {
            "model": model,
            "model_fingerprint": model,
            "dtype": "float32",
            "head_dim": 16,
            "scaling": scaling.to_dict(),
            "label": f"{scaling.label} (checkpoint)" if tuned else scaling.label,
            "carried": tuned or spec == "default",
            "provenance": {**provenance, "date": "2030-01-01", "seed": 1},
        }
        values = changed.get("tuned" if tuned else scaling.method, curve)
        for start, end, value in zip((0, *ENDS), ENDS, values, strict=False):
            numbers = {"perplexity": value, "perplexity_bucket": value, "bucket": [start, end], "targets": 1}
            data = {"fingerprint": "d", "name": "text", "windows": 1}
            measured = {"metric": "perplexity", "data": data, "length": end, "protocol": {"bucket_start": start}}
            append_row(path, {**shared, **measured, **numbers})
        prompts = [{"depth": depth, "key": 1, "right": depth < 0.5} for depth in (0.0, 0.3, 0.6, 1.0)]
        numbers = {"n": 4, "right": 2, "accuracy": 0.5, "interval": [0.15, 0.85], "prompts": prompts}
        measured = {"metric": "passkey", "data": {"fingerprint": "p"}, "length": 64, "protocol": {"iterations": 4}}
        append_row(path, {**shared, **measured, **numbers})
    return str(path)


def with_controls(rows: list[Row], changes: dict[str, float], of: str | None = None) -> list[Row]:
    """The rows of `write_rows` with their controls, which read the last 64 tokens of two documents.

    changes: perplexity over that of the control, minus 1, for the model of that name.
    of: the only model that has controls.
    """
    found: list[Row] = []
    for row in rows:
        if row["metric"] != "perplexity":
            found.append(row)
            continue
        each = 10.0  # tokens of a document
        nats = each * math.log(row["perplexity_bucket"])
        row = {**row, "protocol": {"name": "truncate", **row["protocol"]}}
        found.append({**row, "bucket_targets": 20, "bucket_nats": [[nats + 1], [nats - 1]]})
        if row["length"] <= 64 or of not in (None, row["model"]):
            continue
        change = changes.get(row["model"], 0.0)
        gain = each * math.log1p(change)
        cut = row["perplexity_bucket"] / (1 + change)
        protocol = {**row["protocol"], "name": "last-tokens", "window": 64, "stride": 16}
        numbers = {"perplexity": cut, "perplexity_bucket": cut, "bucket_nats": [[nats + 1 - gain], [nats - 1 - gain]]}
        found.append({**row, "bucket_targets": 20, "protocol": protocol, **numbers})
    return found


def passkeys(rows: list[Row], model: str, right: dict[int, int]) -> list[Row]:
    """Ten passkeys per length of a model of `write_rows`, the first `right` found; spread evenly over the text."""
    (like,) = [row for row in rows if row["metric"] == "passkey" and row["model"] == model][:1]
    made = []
    for length, count in right.items():
        prompts = [
            {"depth": i / 9, "distance": round(length * (1 - i / 9) * 0.9) + 8, "key": 1, "right": i >= 10 - count}
            for i in range(10)
        ]
        numbers = {"n": 10, "right": count, "accuracy": count / 10, "interval": [0.0, 1.0], "prompts": prompts}
        made.append({**like, "protocol": {"iterations": 10}, "length": length, **numbers})
    return made


def new_row(metric: str, length: int | None, spec: str = "default", **fields: Any) -> Row:
    """A row of some evaluator, with what every row has."""
    scaling = RopeScaling.from_spec(spec, RopeScaling("default", original_max_position_embeddings=64))
    record = {"command": f"python {metric}", "commit": "c0ffee", "versions": {"torch": "2"}, "device": "cpu"}
    shared = {
        "model": "m/tiny",
        "model_fingerprint": "f",
        "dtype": "float32",
        "head_dim": 16,
        "scaling": scaling.to_dict(),
        "label": scaling.label,
        "carried": spec == "default",
        "metric": metric,
        "length": length,
        "data": {"name": metric, "fingerprint": metric},
        "protocol": {"name": metric},
        "provenance": {**record, "cpu_count": 1, "date": "2030-01-01", "seed": None},
    }
    return {**shared, **fields}


def perplexities(spec: str, text: str, values: dict[int, float | None], **protocol: Any) -> list[Row]:
    """Rows over one text; None is a length that ran out of memory."""
    rows, start = [], 0
    for length, value in values.items():
        numbers: Row = {"perplexity": value, "perplexity_bucket": value, "bucket": [start, length], "targets": 9}
        bounds = None if value is None else [value - 1, value + 2]
        numbers |= {"error": "out of memory"} if value is None else {"interval": bounds, "interval_bucket": bounds}
        data = {"name": text, "fingerprint": text, "documents": 3}
        said = {"name": "truncate", "bucket_start": start, **protocol}
        if said["name"] == "sliding":
            for name in ("perplexity_bucket", "bucket", "interval_bucket"):
                numbers.pop(name, None)
            del said["bucket_start"]
        rows.append(new_row("perplexity", length, spec, data=data, protocol=said, **numbers))
        start = length
    return rows


def every_kind() -> list[Row]:
    """Rows of every evaluator under two scalings, over two texts and two protocols."""
    rows: list[Row] = []
    for spec, more in (("default", 0), ("yarn:4", 5)):
        rows += perplexities(spec, "novels", {64: 30 + more, 128: 40.5 + more, 256: None})
        rows += perplexities(spec, "sums", {64: 7 + more, 128: 8 + more})
        rows += perplexities(spec, "novels", {128: 33 + more}, name="sliding", stride=16, weighting="window")
        prompts = [{"depth": depth, "right": depth < 0.5, "key": 1} for depth in (0, 0.5, 1)]
        found = {"n": 3, "right": 1, "accuracy": 1 / 3, "interval": [0.06, 0.79], "prompts": prompts}
        said = {"name": "teacher-forced", "iterations": 3}
        for metric in ("passkey", "passkey_hard"):
            rows.append(new_row(metric, 64, spec, protocol=said, **found))
            context = {"context": 64 if more else None, "accuracy": 0.9 if more else None}
            rows.append(new_row(f"{metric}_context", 64, spec, protocol={**said, "passed": 0.8}, **context))
        rows.append(new_row("quality", 128, spec, n=4, right=3, accuracy=0.75, interval=[0.3, 0.95]))
        score = {"value": 25.5 + more, "unit": "%", "standard_error": 3.0, "interval": [20.0, 31.0 + more], "n": 50}
        for task in ("arc_challenge", "mmlu"):
            said = {"name": "lm-eval", "task": task, "num_fewshot": 5, "limit": 50, "metric": "acc"}
            rows.append(new_row("benchmark", None, spec, protocol=said, **score))
        said = {"name": "lm-eval", "task": "niah", "num_fewshot": 0, "limit": None, "metric": "64"}
        rows.append(new_row("benchmark", 64, spec, protocol=said, **score))
    return rows


def write(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
