"""Try every model type of the installed transformers that has RoPE: is it scaled for real, or refused by name?

    python benchmarks/coverage.py                    # all types that have no row yet, each in a process of its own
    python benchmarks/coverage.py llama qwen3_vl     # these, measured anew
    python benchmarks/coverage.py --table            # only the table in docs/models.md, from the rows
    python benchmarks/coverage.py --check            # exit code 1 when the page has another table

For each type a small random model is built (`small_models.py`), patched with four scalings, unpatched, saved, read
again by transformers and by this package, and its logits are compared each time. The config that transformers makes by
default is inspected. Rows go to data/coverage_rows.jsonl; a run that was stopped goes on where it stood.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import check_names  # noqa: E402
from benchmarks.coverage_trial import Trial, judge, try_type  # noqa: E402
from benchmarks.small_models import CAUSAL_TYPES, MODEL_TYPES  # noqa: E402
from scaled_rope.checkpoint import quiet_transformers  # noqa: E402
from scaled_rope.command_line import Parser, run_cli  # noqa: E402
from scaled_rope.provenance import provenance
from scaled_rope.report.page_blocks import with_block  # noqa: E402
from scaled_rope.results import append_row, rows_so_far

ROWS = ROOT / "data" / "coverage_rows.jsonl"
PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- coverage: python benchmarks/coverage.py --table -->\n", "<!-- end of coverage -->\n"
SECONDS, BYTES = 240, 12 * 2**30
"""The most time and memory for one type."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("benchmarks/coverage.py", __doc__ or "")
    add = parser.add_argument
    add("types", nargs="*", metavar="TYPE", help="model types to measure anew (default: all without a row)")
    add("--table", action="store_true", help="write the table from the rows and measure nothing")
    add("--check", action="store_true", help="exit code 1 when docs/models.md has another table than the rows give")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    check_names("model type", args.types, MODEL_TYPES)
    page = PAGE.read_text(encoding="utf-8")
    if args.check:
        return int(page != page_with_table(page, latest(rows_so_far(ROWS))))
    if not args.table:
        measure(args.types or missing(rows_so_far(ROWS)), vars(args))
    rows = latest(rows_so_far(ROWS))
    PAGE.write_text(page_with_table(page, rows), encoding="utf-8")
    print(summary(rows))
    wrong = {row["model_type"]: row["wrong"] for row in rows if row["wrong"]}
    for model_type, faults in wrong.items():
        print(f"{model_type}: {'; '.join(faults)}")
    return int(bool(wrong))


def missing(rows: list[dict[str, Any]]) -> list[str]:
    """The types without a row of the installed versions."""
    now = provenance("cpu", 0, {})["versions"]["transformers"]
    done = {row["model_type"] for row in rows if row["provenance"]["versions"]["transformers"] == now}
    return [name for name in MODEL_TYPES if name not in done]


def measure(types: Sequence[str], arguments: dict[str, Any]) -> None:
    """Try each type in a process of its own, so that one that hangs or dies is a row and not the end."""
    origin = provenance("cpu", 0, arguments)
    context = multiprocessing.get_context("fork")  # all imports are made
    bar = tqdm(types, unit="type", mininterval=0.5 if sys.stderr.isatty() else 10)
    for model_type in bar:
        bar.set_postfix_str(model_type)
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_try_in_child, args=(model_type, theirs))
        child.start()
        theirs.close()
        trial: Trial = {"model_type": model_type, "text": model_type in CAUSAL_TYPES, "rope": True, "built": False}
        if ours.poll(SECONDS):
            try:
                trial = ours.recv()
            except EOFError:
                trial["error"] = "its process died, for example for want of memory"
        else:
            trial["error"] = f"more than {SECONDS} s"
        child.kill()
        child.join()
        append_row(ROWS, {"metric": "coverage", **trial, "wrong": judge(trial), "provenance": origin})


def _try_in_child(model_type: str, answer: Any) -> None:
    import torch

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - families warn of all kinds of things
    with quiet_transformers(hide_bars=True):
        answer.send(try_type(model_type))


# ------------------------------------------------------------------------------------------------------------ the table


def latest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The newest row of each type, in the order of their names."""
    return sorted({row["model_type"]: row for row in rows}.values(), key=lambda row: str(row["model_type"]))


def summary(rows: list[dict[str, Any]]) -> str:
    """Counts in a few sentences."""
    rope = [row for row in rows if row["rope"]]
    built = [row for row in rope if row.get("built")]
    scaled = [row for row in built if "refused" not in row["scalings"]["yarn:4"]]
    wrong = [row for row in rows if row["wrong"]]
    versions = rows[-1]["provenance"]["versions"]
    return (
        f"Of the {len(rows)} types of causal and image-text models in transformers {versions['transformers']}, "
        f"{len(rope)} have RoPE. {len(built)} of them were built small, {len(scaled)} were scaled with effect, "
        f"{len(built) - len(scaled)} refused by name, and {len(wrong)} showed a fault."
    )


def page_with_table(page: str, rows: list[dict[str, Any]]) -> str:
    """The page with the table of these rows between its two marks."""
    return with_block(page, BEGIN, END, table(rows) if rows else "", PAGE.name)


def table(rows: list[dict[str, Any]]) -> str:
    """Types that behave alike in one line, those with most types first."""
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        if row["rope"] and row.get("built"):
            groups[_behaviour(row)].append(f"`{row['model_type']}`")
    lines = [summary(rows), "", "| YaRN, PI, NTK-aware | dynamic YaRN | saved for | types |", "|---|---|---|---|"]
    for behaviour, types in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"| {' | '.join(behaviour)} | {len(types)}: {', '.join(types)} |")
    unbuilt = [row for row in rows if row["rope"] and not row.get("built")]
    if unbuilt:
        lines += ["", "Not tried, since no small model of text could be built:", ""]
        lines += [f"- `{row['model_type']}`: {_short(row['error'])}" for row in unbuilt]
    return "\n".join(lines) + "\n"


def _behaviour(row: dict[str, Any]) -> tuple[str, ...]:
    static = [row["scalings"][spec] for spec in ("yarn:4", "linear:4", "ntk:4")]
    dynamic = row["scalings"]["dynamic-yarn"]
    if "refused" in static[0]:
        return f"refused: {_short(static[0]['refused'])}", "refused", "-"
    works = [name for name, one in zip(("YaRN", "PI", "NTK-aware"), static, strict=True) if "refused" not in one]
    cached = str(dynamic.get("cached", ""))
    if "refused" in dynamic:
        dynamically = f"refused: {_short(dynamic['refused'])}"
    elif cached.startswith("refused"):
        dynamically = "without a cache"
    else:
        dynamically = "yes, with a cache"
    native = all(one.get("native") for one in static if "refused" not in one)
    some = any(one.get("native") for one in static)
    saved = "transformers" if native else "transformers or, in part, this package" if some else "this package"
    return "yes" if len(works) == 3 else f"{' and '.join(works)} only", dynamically, saved


def _short(text: str) -> str:
    text = " ".join(text.split()).removeprefix("refused: ")
    text = text.partition(": ")[2] if text.startswith("architecture") else text
    return text if len(text) <= 160 else text[:157] + "…"


if __name__ == "__main__":
    sys.exit(run_cli(main))
