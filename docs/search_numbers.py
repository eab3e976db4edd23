"""Write the comparison of searches into docs/search.md, from data/search_rows.jsonl.

python docs/search_numbers.py            # after benchmarks/search_worth.py
python docs/search_numbers.py --check    # exit code 1 when the page shows other rows
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scaled_rope.command_line import run_cli
from scaled_rope.evaluation.statistics import Difference, paired_difference
from scaled_rope.report.page_blocks import only_check, rewrite
from scaled_rope.results import Row, rows_so_far

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "data" / "search_rows.jsonl"
PAGE = ROOT / "docs" / "search.md"
BEGIN, END = "<!-- searches: python docs/search_numbers.py -->\n", "<!-- end of searches -->\n"
NAMES = {
    "evolution": "LongRoPE's evolution, 32 divisors",
    "evolution, attention factor too": "the same, attention factor searched too",
    "cma-es": "CMA-ES, four numbers of YaRN",
    "grid": "grid, three numbers of YaRN",
}
TEXTS, LENGTHS = ("bible", "novel"), (512, 1024, 2048)
YARN = {"method": "yarn", "factor": 8.0, "original_max_position_embeddings": 256}
Scores = Mapping[str, Sequence[float]]


class Tests:
    """A scaling on the held-out texts and with passkeys."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows: dict[tuple[str, str, str, int], Row] = {}
        for row in rows:
            if row["metric"] in ("perplexity", "passkey"):
                key = json.dumps(row["scaling"], sort_keys=True), row["metric"], row["data"]["name"], row["length"]
                self._rows[key] = row

    def _of(self, scaling: Row, metric: str, name: str, length: int) -> Row:
        return self._rows[json.dumps(scaling, sort_keys=True), metric, name, length]

    def losses(self, scaling: Row) -> Scores:
        """By text, nats per token of each window at positions 256 to 2048."""
        found = {}
        for text in TEXTS:
            row = self._of(scaling, "perplexity", text, 2048)
            nats = np.concatenate([np.asarray(one) for one in row["bucket_nats"]])
            found[text] = (nats * len(nats) / row["bucket_targets"]).tolist()
        return found

    def answers(self, scaling: Row) -> Scores:
        """By length, 1 for each passkey that is found and 0 for the others."""
        rows = {length: self._of(scaling, "passkey", "passkey", length) for length in LENGTHS}
        return {str(length): [float(one["right"]) for one in row["prompts"]] for length, row in rows.items()}


def _mean(scores: Sequence[Scores]) -> Scores:
    """The mean over seeds, unit by unit."""
    return {name: np.mean([one[name] for one in scores], axis=0).tolist() for name in scores[0]}


def searches(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """By name and budget, a row per seed; names and budgets in the order of the table."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["metric"] == "search":
            found.setdefault((row["protocol"]["name"], row["protocol"]["budget"]), []).append(row)
    return dict(sorted(found.items(), key=lambda item: (item[0][1], list(NAMES).index(item[0][0]))))


def table(rows: Sequence[Row]) -> str:
    """YaRN as it is, then a line per search and budget: means over seeds."""
    tests = Tests(rows)
    lines = ["| search | evaluations | seeds | fitness, at first | found | bible | novel | 512 | 1024 | 2048 |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip

    def line(name: str, facts: Sequence[str], scalings: Sequence[Row]) -> str:
        losses, answers = (
            _mean([tests.losses(one) for one in scalings]),
            _mean([tests.answers(one) for one in scalings]),
        )
        cells = [f"{math.exp(np.mean(losses[text])):.2f}" for text in TEXTS]
        cells += [f"{100 * np.mean(answers[str(length)]):.0f} %" for length in LENGTHS]
        return f"| {' | '.join([name, *facts, *cells])} |"

    lines.append(line("YaRN as it is", ["", "", "", ""], [YARN]))
    for (name, _), some in searches(rows).items():
        first, found = (np.mean([row[field] for row in some]) for field in ("first_fitness", "fitness"))
        facts = [str(max(row["evaluations"] for row in some)), str(len(some)), f"{first:.3f}", f"{found:.3f}"]
        lines.append(line(NAMES[name], facts, [row["scaling"] for row in some]))
    return "\n".join(lines) + "\n"


def _said(gain: Difference, scale: float, digits: int) -> str:
    def number(value: float) -> str:
        return f"{scale * value:+.{digits}f}".replace("-", "−")

    return number(gain.value) + (f" [{', '.join(map(number, gain.interval))}]" if gain.interval else "")


def verdict(rows: Sequence[Row]) -> str:
    """Whether the search of divisors is worth it, against the grid and against YaRN as it is."""
    tests, found = Tests(rows), searches(rows)
    both = {budget for name, budget in found if name == "evolution"} & {
        budget for name, budget in found if name == "grid"
    }
    if not both:
        return "The comparison of the evolution with the grid is not finished.\n"
    budget = max(both)

    def scores(name: str) -> tuple[Scores, Scores]:
        seeds = {row["protocol"]["seed"] for row in found["evolution", budget]}
        seeds &= {row["protocol"]["seed"] for row in found["grid", budget]}
        scalings = [row["scaling"] for row in found[name, budget] if row["protocol"]["seed"] in seeds]
        return _mean([tests.losses(one) for one in scalings]), _mean([tests.answers(one) for one in scalings])

    mine, others, yarn = scores("evolution"), scores("grid"), (tests.losses(YARN), tests.answers(YARN))
    sentences = []
    outcome = ""
    for name, other in (("the grid's best", others), ("YaRN as it is", yarn)):
        loss, right = paired_difference(mine[0], other[0], shares=False), paired_difference(mine[1], other[1])
        sentences.append(
            f"Against {name} the evolution's best changes the loss beyond L by {_said(loss, 1, 3)} nats per token and "
            f"passkeys by {_said(right, 100, 1)} points."
        )
        if other is others:
            better = (loss.shown and loss.value < 0) or (right.shown and right.value > 0)
            worse = (loss.shown and loss.value > 0) or (right.shown and right.value < 0)
            outcome = "yes" if better and not worse else "no" if worse and not better else "no difference is shown"
            if better and worse:
                outcome = "it trades one for the other"
    return f"**Is the search of divisors worth it here? At {budget} evaluations: {outcome}.** {' '.join(sentences)}\n"


def block(path: Path = ROWS) -> str:
    """The text between the marks."""
    rows = rows_so_far(path)
    found = [row for row in rows if row["metric"] == "search"]
    if not found:
        return "Not measured yet.\n"
    made = found[-1]["provenance"]
    hours = sum(
        row["seconds"] for row in found if row["protocol"]["budget"] == max(r["protocol"]["budget"] for r in found)
    )
    head = (
        f"{verdict(rows)}\n{found[0]['protocol']['passes']} passes per evaluation; perplexity at positions 256 to 2048 "
        f"and 50 passkeys at each length, means over seeds. `python benchmarks/search_worth.py` at commit "
        f"{made['commit'][:7]}, {made['device']}, one thread, {hours / 3600:.1f} hours of searches.\n"
    )
    return f"{head}\n{table(rows)}"


def main() -> int:
    check = only_check("docs/search_numbers.py", __doc__)
    return rewrite(PAGE, BEGIN, END, f"\n{block()}\n", ROWS, "python docs/search_numbers.py", check)


if __name__ == "__main__":
    sys.exit(run_cli(main))
