"""Write the counts of the last campaign into docs/reliability.md, from data/reliability_rows.jsonl.

python docs/reliability_numbers.py            # after benchmarks/campaign.sh
python docs/reliability_numbers.py --check    # exit code 1 when the page shows other rows
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import run_cli
from scaled_rope.report.page_blocks import only_check, rewrite
from scaled_rope.results import Row, read_rows

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "data" / "reliability_rows.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- counts: python docs/reliability_numbers.py -->\n", "<!-- end of counts -->\n"
GOALS = {"kills": 500, "damages": 200, "fuzzed inputs": 100_000}
FAULTS = {"kill": "killed", "full disk": "full disk", "removed": "output removed in mid-run",
          "read-only": "made read-only in mid-run", "damage": "damaged files", "start": "Ctrl-C while it imports",
          "fuzz": "damaged inputs"}  # fmt: skip
"""Faults in words."""
OUTCOMES = ("lost", "different", "traceback", "hang", "orphans", "wrong code", "trial failed")
"""Outcomes that must not be; see `benchmarks/campaign_trials.py`."""


def table(rows: Sequence[Row]) -> str:
    """A line per fault and run."""
    lines = ["| fault | of what | trials | kills | identical | refused in one line | anything else |",
             "|---|---|--:|--:|--:|--:|---|"]  # fmt: skip
    for row in sorted(rows, key=lambda row: list(FAULTS).index(row["fault"])):
        outcomes = row["outcomes"]
        if row["fault"] == "fuzz":
            counts = [f"{row['inputs']} inputs", "", "", "read or refused"]
        else:
            counts = [str(row["trials"]), str(row["kills"] or ""), str(outcomes.get("identical", 0)),
                      str(outcomes.get("refused", "") or "")]  # fmt: skip
        bad = ", ".join(f"{outcomes[name]} {name}" for name in OUTCOMES if name in outcomes)
        lines.append(f"| {' | '.join([FAULTS[row['fault']], row['what'], *counts, bad or '0'])} |")
    return "\n".join(lines).replace("|  |", "| |").replace("|  |", "| |")


def sums(rows: Sequence[Row]) -> dict[str, int]:
    return {
        "kills": sum(row["kills"] for row in rows),
        "damages": sum(row["trials"] for row in rows if row["fault"] == "damage"),
        "fuzzed inputs": sum(row["inputs"] for row in rows),
    }


def block(path: Path = ROWS) -> str:
    """The text between the marks: the sums beside the goals, how they were made, and the table."""
    rows = read_rows(path)
    made, bad = rows[-1]["provenance"], Counter[str]()
    for row in rows:
        bad.update({name: count for name, count in row["outcomes"].items() if name in OUTCOMES})
    commits = sorted({commit for row in rows for commit in row["commits"]})
    seconds, mended = sum(row["seconds"] for row in rows), sum(row["mended"] for row in rows)
    found = sums(rows)
    counted = ", ".join(
        f"{found[name]} {name} ({'the goal was' if found[name] < goal else 'goal'} {goal})"
        for name, goal in GOALS.items()
    )
    wrong = ", ".join(f"{bad[name]} {name}" for name in OUTCOMES[:4])
    more = "".join(f", {bad[name]} {name}" for name in OUTCOMES[4:] if bad[name])
    text = f"{counted}: {wrong}{more}. "
    text += f"Made by `benchmarks/campaign.sh` at {'commits' if len(commits) > 1 else 'commit'} {', '.join(commits)}"
    text += f" on {made['cpu_count']} cores of an {made['device']}, {seconds / 3600:.1f} hours of trials,"
    text += f" {made['date']}."
    if mended:
        text += f" {mended} trials had another outcome before something was mended; they count as they ended last."
    return f"{text}\n\n{table(rows)}\n"


def main() -> int:
    check = only_check("docs/reliability_numbers.py", __doc__)
    return rewrite(PAGE, BEGIN, END, f"\n{block()}\n", ROWS, "python docs/reliability_numbers.py", check)


if __name__ == "__main__":
    sys.exit(run_cli(main))
