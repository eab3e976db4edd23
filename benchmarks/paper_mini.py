"""The paper in miniature, on the embedded model and two cores.

    python benchmarks/paper_mini.py                          # everything that is missing, two programs at a time
    python benchmarks/paper_mini.py --list                   # the parts, and what each still lacks
    python benchmarks/paper_mini.py --part table1            # train and evaluate one part
    python benchmarks/paper_mini.py --show                   # the tables, from the rows
    python benchmarks/paper_mini.py --figures docs/images    # and the figures

A run that is finished is not trained again, one that was interrupted continues, and a row that is there is not measured
again. `sweep` comes first, because it chooses the learning rates of the others. Each program has one core: two of them
use two cores better than one with two threads. What they print goes to out/paper-mini/logs.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import paper_mini_report
from benchmarks.common import check_names, run_prepare_commands
from benchmarks.paper_mini_report import BIBLE, NOVEL, Results, Run
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.recipes.runs import is_finished
from scaled_rope.results import Row, append_row, read_rows, rows_so_far
from scaled_rope.training.run_state import read_log

ROWS = "data/paper_mini_rows.jsonl"
TRAINING = "data/paper_mini_training.jsonl"
LOGS = Path("out/paper-mini/logs")
LENGTHS = ["--lengths", "256,512,1024,1536,2048,3072,4096"]
PASSKEYS = ["--lengths", "256,512,1024,2048", "--iterations", "10"]
PARTS = ("sweep", "zero-shot", "table1", "table2", "rerun", "half", "forks")


@dataclass(frozen=True)
class Evaluation:
    """A call of an evaluator; `script` is also the metric of its rows, `data` the name of their data."""

    script: str
    data: str
    flags: Sequence[str]
    seed: int | None = None
    """Of the prompts, in passkeys."""
    control: bool = False
    """Measure the control too: every range with the last 256 tokens alone in view."""

    def command(self, model: str, scalings: Sequence[str], output: str) -> list[str]:
        named = [f"--scaling={scaling}" for scaling in scalings]
        control = ["--control"] * self.control
        return [f"eval/{self.script}.py", "-m", model, *named, *self.flags, *control, "--output", output]

    def is_measured(self, names: Sequence[str], rows: Sequence[Row]) -> bool:
        """Whether every length has a row for each of these runs or scalings of the base, see `name_of`."""
        lengths = [int(n) for n in self.flags[self.flags.index("--lengths") + 1].split(",")]
        found = {
            (paper_mini_report.name_of(row), row["length"], paper_mini_report.is_control(row))
            for row in rows
            if row["metric"] == self.script and row["data"]["name"] == self.data
            if self.seed is None or row["protocol"]["seed"] == self.seed
        }
        wanted = set(itertools.product(names, lengths, (False,)))
        if self.control:  # up to L there is nothing to leave out
            wanted |= {(name, n, True) for name in names for n in lengths if n > paper_mini_report.ORIGINAL}
        return found >= wanted


def on_text(name: str, control: bool = False) -> Evaluation:
    """The evaluation of a held-out text of the demo: six windows of 4096 tokens, read in one pass each."""
    flags = ["--dataset", f"data/cache/demo/{name}", "--windows", "6", *LENGTHS]
    return Evaluation("perplexity", name, flags, control=control)


def on_passkeys(seed: int) -> Evaluation:
    """The evaluation of passkeys: ten prompts per length, different ones for each seed."""
    return Evaluation("passkey", "passkey", [*PASSKEYS, "--seed", str(seed)], seed)


def evaluations(part: str, run: Run) -> list[Evaluation]:
    """The evaluations of a run: the novel; in table 1 also the Bible, the control on both, and passkeys."""
    if part != "table1":
        return [on_text(NOVEL)]
    return [on_text(NOVEL, control=True), on_text(BIBLE, control=True), on_passkeys(run.seed)]


@dataclass(frozen=True)
class Task:
    """Programs to run one after the other, and a function to call when all have succeeded."""

    name: str
    commands: Sequence[Sequence[str]]
    after: Callable[[], None] = lambda: None


def untrained(output: str) -> list[Task]:
    """Tasks that measure the base under methods, forks and dynamic forms, on both texts and with passkeys."""
    methods = ("default", *paper_mini_report.TABLE1)
    calls = {
        "novel": (on_text(NOVEL), (*methods, *paper_mini_report.FORKS_UNTRAINED)),
        "Bible": (on_text(BIBLE), (*methods, *paper_mini_report.FORKS_UNTRAINED)),
        "novel, control": (on_text(NOVEL, control=True), methods[:1]),
        "Bible, control": (on_text(BIBLE, control=True), methods[:1]),
        "novel, dynamic": (on_text(NOVEL), paper_mini_report.FIGURE5[1:]),
        **{f"passkeys {seed}": (on_passkeys(seed), methods) for seed in paper_mini_report.SEEDS},
    }
    rows = rows_so_far(output)
    return [
        Task(f"base, {name}", [call.command(paper_mini_report.BASE, specs, output)])
        for name, (call, specs) in calls.items()
        if not call.is_measured(specs, rows)
    ]


def record(run: Run, output: str) -> None:
    """Append a row about the run's training, once; its provenance is the one that the run itself wrote."""
    if any(row["model"] == run.model for row in rows_so_far(output)):
        return
    log = read_log(paper_mini_report.ROOT / run.name)
    losses = [row["loss"] for row in log]
    row = {
        "metric": "train_loss", "model": run.model, "scaling": run.scaling, "seed": run.seed, "steps": run.steps,
        "learning_rate": run.learning_rate, "late_loss": paper_mini_report.late_loss(losses), "losses": losses,
        "seconds": round(sum(row["seconds"] for row in log), 1), "command": f"finetune.py {' '.join(run.flags())}",
        "provenance": json.loads((paper_mini_report.ROOT / run.name / "provenance.json").read_text()),
    }  # fmt: skip
    append_row(output, row)


def trained(part: str, runs: Sequence[Run], output: str, training: str) -> list[Task]:
    """The tasks still to do for these runs: train them, and measure their final models."""
    rows, tasks = rows_so_far(output), []
    for run in runs:
        todo = evaluations(part, run) if part != "sweep" else []
        commands = [each.command(run.model, (), output) for each in todo if not each.is_measured([run.name], rows)]
        if commands or part == "sweep":
            if not is_finished(run.recipe()):
                commands.insert(0, ["finetune.py", *run.flags()])
            tasks.append(Task(f"{part}, {run.name}", commands, partial(record, run, training)))
    return tasks


def swept(training: str) -> dict[str, float]:
    return paper_mini_report.swept(paper_mini_report.late_losses(rows_so_far(training)))


def tasks_of(part: str, output: str, training: str) -> list[Task]:
    if part == "zero-shot":
        return untrained(output)
    if part == "sweep":
        known = {row["model"] for row in rows_so_far(training)}
        return trained(part, [run for run in paper_mini_report.SWEEP if run.model not in known], output, training)
    return trained(part, paper_mini_report.parts(swept(training))[part], output, training)


def perform(tasks: Sequence[Task], jobs: int) -> None:
    """Do the tasks, `jobs` at a time; the first that fails stops the rest.

    Raises:
        ConfigError: a program failed; the message names it and its log file.
    """
    LOGS.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    failed = threading.Event()

    def do(numbered: tuple[int, Task]) -> None:
        number, task = numbered
        start = time.monotonic()
        log = LOGS / f"{re.sub('[^a-zA-Z0-9.]+', '-', task.name)}.log"
        with log.open("ab") as file:
            for command in task.commands:
                if failed.is_set():
                    return
                code = subprocess.run([sys.executable, *command], env=environment, stdout=file, stderr=file).returncode
                if code:
                    failed.set()
                    raise ConfigError(f"{command[0]} of {task.name!r} ended with exit code {code}; see {log}")
        task.after()
        print(f"[{number}/{len(tasks)}] {task.name}: {time.monotonic() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(do, enumerate(tasks, start=1)):
            pass


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/paper_mini.py", __doc__)
    add = parser.add_argument
    add("--part", action="append", help=", ".join(PARTS) + " (default: all)")
    add("--jobs", type=int, default=2, metavar="N", help="programs at a time, a core each (default %(default)s)")
    add("--list", action="store_true", help="the parts, and how many runs each still lacks")
    add("--show", action="store_true", help="print the tables")
    add("--figures", metavar="FOLDER", help="draw the figures")
    add("--output", default=ROWS, metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--training", default=TRAINING, metavar="FILE", help="and those of the runs here (default %(default)s)")
    args = parser.parse_args(argv)
    check_names("part", args.part, PARTS)
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs} is not allowed; 1 or more")
    if args.show or args.figures:
        results = Results(read_rows(args.output))
        if args.figures:
            print("\n".join(map(str, paper_mini_report.draw(results, swept(args.training), Path(args.figures)))))
        if args.show:
            for title, text in paper_mini_report.tables(results, read_rows(args.training)).items():
                print(f"{title}\n\n{text}\n")
        return 0
    if not args.list:
        run_prepare_commands(paper_mini_report.RECIPE)  # the text that the runs train on
    for part in args.part or PARTS:
        tasks = tasks_of(part, args.output, args.training)
        if args.list:
            print(f"{part:<10} {len(tasks)} to do")
        else:
            perform(tasks, args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
