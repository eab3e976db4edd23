"""Is LongRoPE's search worth it? The embedded model's divisors searched in four ways with as many passes each.

    python benchmarks/search_worth.py                     # all searches and tests; continues where it was ended
    python benchmarks/search_worth.py --seeds 0 --evaluations 100 --output out/search_worth_small --rows out/rows.jsonl
    python docs/search_numbers.py                         # writes docs/search.md from the rows

Per seed the same windows and prompts, none of a test, judge every candidate: LongRoPE's evolution with its attention
factor, the same with the attention factor searched too, CMA-ES over YaRN's four numbers, and a grid over its betas and
attention factor. All are given 100 evaluations first, then 400, then 1344; a grid is another one for each budget, the
others go on. The best of each is tested on held-out text and passkeys by eval/perplexity.py and eval/passkey.py, beside
YaRN as it is. Needs the demo's texts and the package cmaes.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import ROOT, check_names
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.flags.shared import check_least
from scaled_rope.results import Row, append_row, read_rows
from scaled_rope.scaling.record import RopeScaling

MODEL, TARGET = "models/tiny-llama-256", 2048
TEXTS = "data/cache/demo"
VARIANTS: dict[str, tuple[str, ...]] = {
    "evolution": (),
    "evolution, attention factor too": ("--attention-factor", "search"),
    "cma-es": ("--strategy", "cma-es"),
    "grid": ("--strategy", "grid"),
}
"""The searches that are compared, and their flags of `scaled-rope search`."""
BUDGETS = (100, 400)
"""Evaluations before the last budget, so that there is an answer early."""
SEARCHED = ("--windows", "3", "--prompts", "2", "--held-back", "0")
WINDOWS, ITERATIONS = 12, 50
"""Windows of each held-out text, and passkeys of each length, of the test."""


def search(name: str, seed: int, evaluations: int, output: Path) -> Path:
    """Run a search, or the rest of it; returns its folder.

    Raises:
        ConfigError: it failed; its message is on the terminal.
    """
    folder = output / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
    if name == "grid":  # its fineness follows from the budget
        folder = folder.with_name(f"{folder.name}-{evaluations}")
    command = [sys.executable, "-m", "scaled_rope", "search", MODEL, "--target", str(TARGET)]
    command += ["--dataset", f"{TEXTS}/train", *SEARCHED, *VARIANTS[name], "--seed", str(seed)]
    command += ["--evaluations", str(evaluations), "--output", str(folder)]
    print(f"search: {name}, seed {seed}, {evaluations} evaluations", flush=True)
    if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
        raise ConfigError(f"the search {name!r} with seed {seed} failed")
    return folder


def outcome(name: str, seed: int, folder: Path, budget: int) -> Row:
    """A row for the best after so many evaluations, from the trace of a search."""
    head, *rows = read_rows(folder / "trace.jsonl")
    settings, rows = head["settings"], rows[:budget]
    best = min(rows, key=lambda row: (row["fitness"], row["evaluation"]))
    return {
        "metric": "search",
        "model": MODEL,
        **{field: settings[field] for field in ("model_fingerprint", "dtype")},
        "scaling": best["scaling"],
        "data": {"name": settings["data"], "fingerprint": settings["text"]},
        "protocol": {
            "name": name,
            "seed": seed,
            "budget": budget,
            "passes": sum(map(len, best["answers"].values())) + len(best["beyond"]),
        },
        "length": TARGET,
        "evaluations": len(rows),
        "found_at": best["evaluation"] + 1,
        "fitness": best["fitness"],
        "first_fitness": min(row["fitness"] for row in rows if row["origin"]["kind"] == "start"),
        "seconds": sum(row["seconds"] for row in rows),
        "provenance": best["provenance"],
    }


def test(scalings: Sequence[RopeScaling], rows: Path) -> None:
    """Measure scalings on the held-out texts and on passkeys; what the file of rows has is not measured again.

    Raises:
        ConfigError: an evaluator failed.
    """
    # Lists of 32 divisors make long specs, and a command has its limit; the embedded model is the default.
    specs = [word for one in scalings for word in ("--scaling", one.to_spec())]
    texts = [word for name in ("bible", "novel") for word in ("--dataset", f"{TEXTS}/{name}")]
    for script, flags in (
        ("perplexity", [*texts, "--windows", str(WINDOWS), "--lengths", f"256,{TARGET}"]),
        ("passkey", ["--iterations", str(ITERATIONS), "--lengths", f"512,1024,{TARGET}"]),
    ):
        command = [sys.executable, f"eval/{script}.py", "-m", MODEL, *specs, *flags, "--output", str(rows)]
        print(f"test: eval/{script}.py, {len(scalings)} scalings", flush=True)
        if subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
            raise ConfigError(f"eval/{script}.py failed")


def main() -> int:
    parser = Parser("benchmarks/search_worth.py", __doc__)
    parser.add_argument("--seeds", default="0,1", metavar="N,N,...", help="(default %(default)s)")
    parser.add_argument(
        "--evaluations", type=int, default=1344, metavar="N", help="of each search (default %(default)s)"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help=f"of: {'; '.join(VARIANTS)}; repeatable")
    parser.add_argument("--output", default="out/search_worth", metavar="DIR", help="traces (default %(default)s)")
    parser.add_argument("--rows", default="data/search_rows.jsonl", metavar="FILE", help="(default %(default)s)")
    args = parser.parse_args()
    check_names("search", args.only, VARIANTS)
    if not all(seed.isdecimal() for seed in args.seeds.split(",")):
        raise ConfigError(f"--seeds {args.seeds} is not allowed; whole numbers separated by commas")
    check_least(args, evaluations=1)
    rows = Path(args.rows).resolve()
    base = RopeScaling("default", original_max_position_embeddings=256)
    budgets = [*(budget for budget in BUDGETS if budget < args.evaluations), args.evaluations]
    for budget, seed, name in itertools.product(budgets, map(int, args.seeds.split(",")), args.only or VARIANTS):
        folder = search(name, seed, budget, Path(args.output).resolve())
        row = outcome(name, seed, folder, budget)
        test([RopeScaling.from_spec("yarn:8", base), RopeScaling.from_dict(row["scaling"])], rows)
        append_row(rows, row, once=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
