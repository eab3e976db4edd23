"""Trials that were drawn with several seeds, as one row: how many there were, how many were right, the interval."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from scaled_rope.evaluation.statistics import wilson_interval
from scaled_rope.results import Row


def pooled(rows: Sequence[Row]) -> Row:
    """Join rows of one model, length and protocol that differ in the seed of their prompts.

    Rows that failed count only if all did; of several rows with one seed, the last counts. The joined row has the
    fields of the last one, `n`, `right`, `accuracy`, `interval` and `prompts` of all, and in its protocol "seeds", a
    list, instead of "seed". A row that is alone stays as it is.
    """
    measured = [row for row in rows if not row.get("error")]
    by_seed = {row["protocol"].get("seed"): row for row in measured or rows}
    each = [by_seed[seed] for seed in sorted(by_seed, key=lambda seed: (seed is None, seed))]
    last = (measured or rows)[-1]
    if len(each) == 1 or not measured:
        return last
    n, right = (sum(row[name] for row in each) for name in ("n", "right"))
    prints = json.dumps([row["data"].get("fingerprint") for row in each])
    joined = {
        **last,
        "data": {**last["data"], "fingerprint": hashlib.sha256(prints.encode()).hexdigest()[:16]},
        "protocol": {name: value for name, value in last["protocol"].items() if name != "seed"}
        | {"seeds": [row["protocol"].get("seed") for row in each]},
        **{"n": n, "right": right, "accuracy": right / n, "interval": wilson_interval(right, n)},
    }
    if all("prompts" in row for row in each):
        joined["prompts"] = [prompt for row in each for prompt in row["prompts"]]
    if all(row.get("seconds") is not None for row in each):
        joined["seconds"] = round(sum(row["seconds"] for row in each), 3)
    return joined
