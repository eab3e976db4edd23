"""Rows of benchmarks/support.sh, and the table in docs/support.md that is made of them.

python benchmarks/support.py              # writes the table
python benchmarks/support.py --check      # exit code 1 when the page has another one
python benchmarks/support.py --record NAME --report REPORT.xml     # appends a row, for support.sh
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.provenance import package_version, provenance
from scaled_rope.report.page_blocks import with_block
from scaled_rope.results import append_row, read_rows

ROWS = ROOT / "data" / "support_rows.jsonl"
PAGE = ROOT / "docs" / "support.md"
BEGIN, END = "<!-- python benchmarks/support.py -->\n", "<!-- end of the table -->\n"
PACKAGES = ("transformers", "torch", "triton", "numpy", "tokenizers", "huggingface_hub")


def counts(report: Path) -> dict[str, Any]:
    """Read a JUnit file of pytest: tests by outcome, their seconds, and the names of those that failed.

    Raises:
        ConfigError: there is no such file, as where pytest itself has failed.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError) as error:
        raise ConfigError(f"report {report} cannot be read: {error}; the log beside it says why") from error
    failing = [_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    seconds = round(sum(float(case.get("time", 0)) for case in cases))
    passed = len(cases) - len(failing) - skipped
    return {"passed": passed, "skipped": skipped, "failed": len(failing), "failing": failing, "seconds": seconds}


def _name(case: ElementTree.Element) -> str:
    return f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The last row of each combination, one line each, in the order in which they first came."""
    last = {row["name"]: row for row in rows}
    lines = [
        "| | Python | transformers | torch | triton | numpy | passed | skipped | failed | commit, machine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in last.items():
        source, packages = row["provenance"], row["packages"]
        versions = [packages[package] for package in ("transformers", "torch", "triton", "numpy")]
        failed = "0" if not row["failed"] else f"{row['failed']}: {', '.join(row['failing'])}"
        place = f"{(source['commit'] or '?')[:7]}, {source['device']}"
        cells = [name, source["versions"]["python"], *versions, row["passed"], row["skipped"], failed, place]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def page_with_table(page: str, rows: Sequence[dict[str, Any]]) -> str:
    return with_block(page, BEGIN, END, table(rows), PAGE.name)


def main() -> int:
    parser = Parser("benchmarks/support.py", __doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--record", metavar="NAME")
    parser.add_argument("--report", metavar="FILE", type=Path)
    args = parser.parse_args()
    if args.record:
        if args.report is None:
            raise ConfigError("--record goes with --report FILE")
        row = {"name": args.record, "packages": {name: package_version(name) for name in PACKAGES}}
        row |= {**counts(args.report), "provenance": provenance("cpu", None, {})}
        append_row(ROWS, row)
        print(f"{args.record}: {row['passed']} passed, {row['skipped']} skipped, {row['failed']} failed")
        return 0
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_table(page, read_rows(ROWS))
    if args.check:
        return int(page != wanted)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
