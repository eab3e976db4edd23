"""Write the tables of engines that were certified into docs/serving.md, from data/engines.jsonl.

python docs/engines.py            # writes the tables
python docs/engines.py --check    # exit code 1 when the page has other ones
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import run_cli
from scaled_rope.files import write_atomic
from scaled_rope.report.page_blocks import only_check, with_block
from scaled_rope.results import read_rows

ROOT = Path(__file__).resolve().parents[1]
ROWS = ROOT / "data" / "engines.jsonl"
PAGE = ROOT / "docs" / "serving.md"
BEGIN, END = "<!-- engines: python docs/engines.py -->\n", "<!-- end of engines -->\n"
TITLES = {
    "transformers": "transformers",
    "vllm": "vLLM",
    "llama.cpp": "llama.cpp,",
    "mlx": "mlx-lm",
    "sglang": "SGLang",
}

Row = dict[str, Any]


def is_control(row: Row) -> bool:
    return row["protocol"]["served"] != "as claimed"


def title(row: Row) -> str:
    """The engine, its version and how it was asked."""
    asked = row["protocol"]
    return f"{TITLES[asked['engine']]} {asked['version']}, {asked['asked']}"


def spec(row: Row) -> str:
    """The scaling as it was asked for, long lists left out."""
    return f"`{re.sub(r'(?:[0-9.e]+[+]){3,}[0-9.e]+', '…', row['spec'])}`"


def named(row: Row) -> str:
    """The scalings that were named instead of the claim, LongRoPE's lists left out."""
    return " or ".join(dict.fromkeys(re.sub(r" \(short_factor=[^)]*\)", "", name) for name in row["named"]))


def cell(row: Row | None) -> str:
    """The word of `export`, and the verdict of the certificate."""
    if row is None:
        return ""
    status = row["export"]["status"]
    if status == "refused":
        return "refused"
    if row["verdict"] == "right":
        return f"{status}: right, {row['worst']:.1e}"
    if row["export"].get("older_keys") is False:
        return f"not in the older keys: {row['named'][0]}"
    word = f"**{row['verdict']}**" if status == "exact" else row["verdict"]
    return f"{status}: {word}, {named(row)}"


def scalings_table(rows: Sequence[Row]) -> list[str]:
    """One line per scaling, one column per engine; rows of one model and dtype."""
    heads = list(dict.fromkeys(map(title, rows)))
    found = {(spec(row), title(row)): row for row in rows}
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in dict.fromkeys(map(spec, rows)):
        lines.append(f"| {name} | {' | '.join(cell(found.get((name, head))) for head in heads)} |")
    return lines


def controls_table(rows: Sequence[Row]) -> list[str]:
    """One line per control: what was claimed, what was served, and what the certificate says."""
    lines = ["| engine | claimed | served | exit code | the certificate |", "|---|---|---|---|---|"]
    for row in rows:
        said = row["sentence"].partition(" (worst")[0]
        cells = (title(row), spec(row), f"`{row['protocol']['served']}`", row["exit_code"], said)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def cache_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| | dtype | GiB | tokens that vLLM says | tokens planned | sequences of the served length | planned |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        cache = row["cache"]
        sequences = (f"{cache['sequences']:.2f}", f"{cache['plan_sequences']:.2f}")
        numbers = (cache["bytes"] >> 30, cache["tokens"], cache["plan_tokens"], *sequences)
        lines.append(f"| {row['model']}, {spec(row)} | {row['dtype']} | {' | '.join(map(str, numbers))} |")
    return lines


def block(rows: Sequence[Row]) -> Iterator[str]:
    """The text between the marks, paragraph by paragraph."""
    engines = [row for row in rows if row["metric"] == "engine"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in engines:
        if not is_control(row):
            groups.setdefault((row["model"], row["dtype"]), []).append(row)
    for (model, dtype), group in groups.items():
        lengths = sorted({tuple(row["protocol"]["lengths"]) for row in group})
        asked = " or ".join(f"{', '.join(map(str, one[:-1]))} and {one[-1]}" for one in lengths)
        yield f"{model} in {dtype}, prompts of {asked} tokens:"
        yield "\n".join(scalings_table(group))
    controls = [row for row in engines if is_control(row)]
    if controls:
        right = sum(row["expected"] for row in controls)
        yield f"Controls, in which the engine was given the words of another scaling; {right} of {len(controls)} named:"
        yield "\n".join(controls_table(controls))
    caches = [row for row in engines if "cache" in row]
    if caches:
        yield "The key/value cache, as vLLM reports it at its start and by `scaled-rope plan --serve`:"
        yield "\n".join(cache_table(caches))
    sources = [row["provenance"] for row in rows]
    machines = dict.fromkeys(f"{one['cpu_count']} cores of an {one['device']}" for one in sources)
    commits = sorted({(one["commit"] or "unknown")[:7] for one in sources})
    yield (
        "[data/engines.jsonl](../data/engines.jsonl), made by `benchmarks/engines/run.py` on "
        f"{' and '.join(machines)}, commits {', '.join(commits)}."
    )


def page_with_block(page: str, rows: Sequence[Row]) -> str:
    return with_block(page, BEGIN, END, "\n" + "\n\n".join(block(rows)) + "\n\n", PAGE.name)


def main() -> int:
    check = only_check("docs/engines.py", __doc__)
    page = PAGE.read_text(encoding="utf-8")
    wanted = page_with_block(page, read_rows(ROWS))
    if check:
        return int(page != wanted)
    write_atomic(PAGE, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
