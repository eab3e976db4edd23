"""The paper in miniature, on the embedded model and two cores.

    python benchmarks/paper_mini.py --list                   # the parts, and what each still lacks
    python benchmarks/paper_mini.py --part table1            # train and evaluate one part
    python benchmarks/paper_mini.py --part table1 --show     # its table, from the rows

A run that is finished is not trained again, one that was interrupted continues, and a row that is there is not measured
again. Two processes with OMP_NUM_THREADS=1 on different parts use two cores better than one process with two threads.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

from scaled_rope.errors import ConfigError, Parser, run_cli, unknown
from scaled_rope.mini import LENGTHS, PARTS, RECIPE, Run, missing, table
from scaled_rope.results import read_rows

ROWS = "data/paper_mini_rows.jsonl"
BOOKS = ["--dataset", "data/cache/books/heldout", "--windows", "12"]
PROOFS = ["--dataset", "standin:hol-light", "--samples", "12"]
ZERO_SHOT = ("default", "linear:8", "ntk:8", "abf:8,theta=200000", "ntk-by-parts:8", "yarn:8")
FIGURE5 = ("default", "dynamic-linear", "dynamic-ntk", "dynamic-yarn")
FORKS = (
    "yarn:8", "yarn:8,truncate=false", "yarn:8,ramp=rotations",
    "yarn:8,beta_fast=16", "yarn:8,beta_fast=8", "yarn:8,beta_slow=2", "yarn:8,beta_slow=4",
)  # fmt: skip


def evaluate(script: str, models: Sequence[str], scalings: Sequence[str], flags: Sequence[str], output: str) -> None:
    """Run one of the evaluators; what `output` holds is skipped there.

    Raises:
        ConfigError: it failed; what it says is on the terminal.
    """
    command = [sys.executable, f"eval/{script}.py", "--output", output, *flags]
    for model in models:
        command += ["-m", model]
    for scaling in scalings:
        command += ["--scaling", scaling]
    if code := subprocess.run(command).returncode:
        raise ConfigError(f"eval/{script}.py ended with exit code {code}")


def prepare() -> None:
    """Fetch and pack the text that the runs train on, as train.sh does; nothing where it is there."""
    script = f"source ./environment.sh; read_recipe {RECIPE}"
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], env=os.environ | {"PYTHON": sys.executable}, check=True)


def train(runs: Sequence[Run]) -> None:
    from scaled_rope.training import Trainer

    for run in missing(runs):
        Trainer(run.recipe()).run()


def zero_shot(output: str) -> None:
    """The base under the methods, the dynamic forms and the forks, on both texts, and its passkeys."""
    base = ["models/tiny-llama-256"]
    for text in (BOOKS, PROOFS):
        evaluate("perplexity", base, (*ZERO_SHOT, *FORKS[1:]), [*text, "--lengths", LENGTHS], output)
        evaluate("perplexity", base, FIGURE5, [*text, "--lengths", LENGTHS], output)
    passkeys = ["--lengths", "128,256,512,1024,2048", "--iterations", "10"]
    evaluate("passkey", base, (*ZERO_SHOT, "dynamic-yarn"), passkeys, output)


def trained(runs: Sequence[Run], output: str) -> None:
    train(runs)
    for run in runs:
        for text in (BOOKS, PROOFS):
            evaluate("perplexity", [run.model], (), [*text, "--lengths", LENGTHS], output)
        if run.steps == max(one.steps for one in runs):
            evaluate("passkey", [run.model], (), ["--lengths", "128,256,512,1024,2048", "--iterations", "10"], output)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/paper_mini.py", __doc__)
    parser.add_argument("--part", action="append", help="zero-shot, " + ", ".join(PARTS) + " (default: all)")
    parser.add_argument("--list", action="store_true", help="the parts, and how many runs each still lacks")
    parser.add_argument("--show", action="store_true", help="print the tables of the parts that train")
    parser.add_argument("--output", default=ROWS, metavar="FILE", help="rows are appended here (default %(default)s)")
    args = parser.parse_args(argv)
    known = ("zero-shot", *PARTS)
    for name in args.part or ():
        if name not in known:
            raise unknown("part", name, known)
    for name in args.part or known:
        if args.list:
            lacks = missing(PARTS.get(name, ()))
            print(f"{name:<10} {len(PARTS.get(name, ()))} runs, {len(lacks)} to train")
        elif args.show:
            if name in PARTS:
                print(f"{name}\n{table(read_rows(args.output), PARTS[name])}\n")
        else:
            prepare()
            if name == "zero-shot":
                zero_shot(args.output)
            else:
                trained(PARTS[name], args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
