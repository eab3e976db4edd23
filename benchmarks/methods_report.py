"""Write the tables of all methods into docs/methods.md, from the rows of benchmarks/methods.py and methods_cost.py.

python benchmarks/methods_report.py            # writes the tables
python benchmarks/methods_report.py --check    # exit code 1 when the page has other ones
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT
from benchmarks.methods import FACTORS, STUDIES, Study
from scaled_rope.checkpoint import load_config
from scaled_rope.command_line import run_cli
from scaled_rope.evaluation.controls import CONTROL, Change, compare
from scaled_rope.files import write_atomic
from scaled_rope.report.page_blocks import only_check, with_block
from scaled_rope.results import read_rows
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.serving.export import export

ROWS = ROOT / "data" / "methods_rows.jsonl"
PAGE = ROOT / "docs" / "methods.md"
BEGIN, END = "<!-- methods: python benchmarks/methods_report.py -->\n", "<!-- end of methods -->\n"
SERVERS = ("vllm", "sglang", "llama.cpp", "transformers")
COSTS = {"seconds": "time", "seconds_per_token": "time a token", "memory": "memory"}
"""Fields of a row about costs, and how their columns are called."""
NAMES = {"vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp", "transformers": "transformers"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A method at a factor, as measured.

    Attributes:
        beyond: by text, the perplexity from L to s·L against the control.
        short: by text, the perplexity up to L against the unscaled model.
        found, asked: passkeys at s·L.
        servers: the programs that serve it as it is.
        cost: `COSTS` as multiples of the unscaled model's; None where one of the two was not measured.
    """

    spec: str
    beyond: Mapping[str, Change | None]
    short: Mapping[str, Change | None]
    found: int | None
    asked: int
    servers: Sequence[str]
    cost: Mapping[str, float | None]

    @property
    def rank(self) -> tuple[float, float]:
        """The order in which users look: keys found, then the lowest perplexity beyond L, by the first text."""
        change = next(iter(self.beyond.values()), None)
        return -(self.found or 0), change.share if change is not None else float("inf")


def is_control(row: Row) -> bool:
    return row["protocol"]["name"] == CONTROL


def label_of(spec: str, study: Study) -> str:
    base = RopeScaling("default", original_max_position_embeddings=study.original)
    return RopeScaling.from_spec(spec, base).label


@cache
def served_by(spec: str, model: str, original: int, length: int) -> tuple[str, ...]:
    """The programs that `scaled-rope export` writes a scaling for without loss."""
    config = load_config(str(ROOT / model))
    scaling = RopeScaling.from_spec(spec, RopeScaling.from_config(config))
    made = {name: export(scaling, config, name, length) for name in SERVERS}
    return tuple(NAMES[name] for name, report in made.items() if report.exit_code == 0 and report.status == "exact")


def lines_of(rows: Sequence[Row], study: Study, factor: int) -> list[Line]:
    """The measured methods at a factor, the best first."""
    target = study.original * factor
    mine = [row for row in rows if row["model"] == study.model]
    read = [row for row in mine if row["metric"] == "perplexity" and row["data"]["window_tokens"] == target]
    texts = list(dict.fromkeys(row["data"]["name"] for row in read))
    table = {(row["label"], row["data"]["name"], row["length"]): row for row in read if not is_control(row)}
    control = {(row["data"]["name"], row["length"]): row for row in read if is_control(row)}
    asked = {row["label"]: row for row in mine if row["metric"] == "passkey" and row["length"] == target}
    unscaled = label_of("default", study)
    costs = {row["spec"]: row for row in mine if row["metric"] == "cost" and row["length"] == target}
    found = []
    for spec in study.specs(factor):
        label = label_of(spec, study)
        if not any((label, text, study.original) in table for text in texts):
            continue
        beyond, short = {}, {}
        for text in texts:
            own = [table.get((label, text, length)) for length in study.lengths(factor)[1:]]
            others = [control.get((text, length)) for length in study.lengths(factor)[1:]]
            pairs = [(one, other) for one, other in zip(own, others, strict=True) if one and other]
            beyond[text] = compare(pairs) if len(pairs) == len(own) else None
            pair = table.get((label, text, study.original)), table.get((unscaled, text, study.original))
            short[text] = compare([(pair[0], pair[1])]) if pair[0] and pair[1] else None
        key = asked.get(label)
        found.append(
            Line(
                spec,
                beyond,
                short,
                None if key is None else key["right"],
                0 if key is None else key["n"],
                served_by(spec, study.model, study.original, target),
                {key: _times(costs.get(spec), costs.get("default"), key) for key in COSTS},
            )
        )
    return sorted(found, key=lambda line: line.rank)


def _times(row: Row | None, plain: Row | None, key: str) -> float | None:
    return row[key] / plain[key] if row and plain else None


def table_of(lines: Sequence[Line]) -> list[str]:
    """A table in Markdown."""
    texts = list(lines[0].beyond) if lines else []
    heads = [f"{text}, against the control" for text in texts]
    head = ["", "passkeys", *heads, "up to L", *COSTS.values(), "served by"]
    out = [f"| {' | '.join(head)} |".replace("|  |", "| |"), "|---" * len(head) + "|"]
    for line in lines:
        keys = "not measured" if line.found is None else f"{line.found}/{line.asked}"
        beyond = ["not measured" if change is None else str(change) for change in line.beyond.values()]
        short = next(iter(line.short.values()), None)
        servers = "all" if len(line.servers) == len(SERVERS) else ", ".join(line.servers) or "none"
        cost = ["not measured" if times is None else f"{times:.1f}×" for times in line.cost.values()]
        cells = [f"`{line.spec}`", keys, *beyond, "" if short is None else short.short, *cost, servers]
        out.append(f"| {' | '.join(cells)} |")
    return out


def page_part(rows: Sequence[Row]) -> str:
    """The part of the page between the marks."""
    out = []
    for name, study in STUDIES.items():
        measured = {factor: lines_of(rows, study, factor) for factor in reversed(FACTORS)}
        for index, (factor, lines) in enumerate(one for one in measured.items() if one[1]):
            title = f"{name}, L = {study.original}, read at {factor} times that: {study.original * factor} tokens"
            body = "\n".join(table_of(lines))
            folded = f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"
            out.append(f"**{title}**\n\n{body}" if index == 0 else folded)
    return "\n\n".join(out) + "\n"


def rewritten(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables between its marks.

    Raises:
        ConfigError: the page lacks them.
    """
    return with_block(page, BEGIN, END, f"\n{page_part(rows)}\n", PAGE.name)


def main(argv: Sequence[str] | None = None) -> int:
    check = only_check("benchmarks/methods_report.py", __doc__, argv)
    page = PAGE.read_text(encoding="utf-8")
    new = rewritten(page, read_rows(ROWS))
    if check:
        if new != page:
            print(f"{PAGE} has other tables than {ROWS}; run python benchmarks/methods_report.py")
            return 1
        return 0
    write_atomic(PAGE, new)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
