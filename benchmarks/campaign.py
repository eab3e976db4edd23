"""Kill runs, fill their disks and damage their files, hundreds of times, and compare what they leave in the end.

    ./benchmarks/campaign.sh                         the whole campaign, which continues where it was ended
    ./benchmarks/campaign.sh --hours 0.5 --only kill
    ./benchmarks/campaign.sh --again "kill: perplexity: 17"

Trials are appended to a file of rows; those that are in it are not done again. A trial follows from its number alone,
except for the moment at which a signal arrives. All are forked from one process that has imported everything, because
a start costs many seconds. At the end, and with `--summary`, the counts go to data/reliability_rows.jsonl, and
`python docs/reliability_numbers.py` writes them into docs/reliability.md. The exit code is 1 if a trial was no good.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import campaign_trials as trials
from benchmarks.campaign_runs import PRELOAD, RUNS, make_inputs
from benchmarks.campaign_trials import GOOD, Known, Place
from benchmarks.common import ROOT, check_names
from scaled_rope.command_line import Parser, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.results import Row, append_row, rows_so_far

SUMMARY = ROOT / "data" / "reliability_rows.jsonl"
FUZZED = 500
"""Inputs of one trial of fuzzing."""

STARTS = {"finetune.py": "training", "tokenization.py": "tokenization", "eval/perplexity.py": "perplexity",
          "eval/report.py": "report"}  # fmt: skip
"""Script -> the run whose flags it gets when a new interpreter is interrupted."""
DAMAGED = {"state": "training", "state, two ranks": "training, two ranks", "packed set": "tokenization",
           "set to train on": "training", "saved losses": "perplexity, --save-nll", "rows": "perplexity"}  # fmt: skip
"""Damaged thing -> the run that reads it."""
HEAVY = {"training": 40, "training, adapters": 15, "training, two ranks": 20, "tune": 20, "report": 15}
"""Kills of the runs that take seconds of a processor; the others take tenths of one."""
COUNTS: dict[str, dict[str, int]] = {
    "kill": dict.fromkeys(RUNS, 36) | HEAVY,
    "full disk": dict.fromkeys(RUNS, 4) | dict.fromkeys(HEAVY, 3),
    "removed": dict.fromkeys(RUNS, 2),
    "read-only": dict.fromkeys(RUNS, 2),
    "damage": {"packed set": 30, "rows": 16, "saved losses": 60, "set to train on": 20, "state": 95,
               "state, two ranks": 20},
    "start": dict.fromkeys(STARTS, 3),
    "fuzz": {"fuzz": 200},
}  # fmt: skip
"""Fault -> run (or what is damaged) -> trials."""
PHASES = (("kill", "full disk", "removed", "read-only", "damage"), ("start",), ("fuzz",))
"""Faults whose trials take turns."""


# ---------------------------------------------------------------------------------------------------------- damages


Trial = tuple[str, Callable[[], Row]]
"""Kinds of trials, and the function that does each."""


def template(what: str, place: Place) -> Row:
    """Make what is to be damaged in `place.out`; its "folder", and its "files" there."""
    place.clear()
    run, folder = RUNS[DAMAGED[what]], place.out
    if what.startswith("state"):
        codes = trials.start(run, place, 0, more=run.begin or ()).finish()
    elif what == "set to train on":
        folder, codes = place.inputs / "set", [0]
    elif what == "rows":  # as they are half-way
        codes = [0]
        trials.start(run, place, 22, lambda: os.kill(os.getpid(), signal.SIGKILL)).finish()
    else:
        codes = trials.start(run, place, 0).finish()
        if what == "saved losses":
            (place.out / "rows.jsonl").unlink()  # or else they would not be read
    if any(codes):
        raise RuntimeError(f"{what}: {codes}: {place.text.read_text()[-3000:]}")
    files = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
    return {"folder": str(folder), "files": [file for file in files if not file.endswith(".lock")]}


def damage(what: str, place: Place, known: Known) -> Iterator[Trial]:
    """Trials without end: of each file in each way, in rounds; the order is random, so that any number is a sample."""
    kept = place.folder / f"template-{re.sub('[^a-z]', '-', what)}"
    if not kept.exists():
        record = trials.in_own_process(lambda: template(what, place))
        if "files" not in record:
            raise RuntimeError(f"{what}: {record}")
        staged = kept.with_name(f"{kept.name}.partial")
        shutil.copytree(record["folder"], staged)
        (place.folder / f"{kept.name}.json").write_text(json.dumps(record))
        staged.rename(kept)
    record = json.loads((place.folder / f"{kept.name}.json").read_text())
    folder = Path(record["folder"])
    own = folder == place.out or place.out in folder.parents
    # Rows carry no hash of themselves, as docs/reliability.md says.
    ways = [how for how in trials.DAMAGES if not (what == "rows" and how == "flip")]

    def trial(file: str, how: str, title: str) -> Row:
        place.clear()
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        try:
            if not trials.damage(folder / file, how, random.Random(title)):
                return {"outcome": "identical", "note": "nothing to damage"}
            return {"outcome": trials.to_the_end(DAMAGED[what], place, known, may_refuse=True)}
        finally:
            if not own:
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)

    for number in itertools.count():
        pairs = list(itertools.product(record["files"], ways))
        random.Random(f"{what}/{number}").shuffle(pairs)
        for file, how in pairs:
            title = f"damage: {what}: {number}: {file}, {how}"
            yield title, functools.partial(trial, file, how, title)


# ------------------------------------------------------------------------------------------------- starts and fuzzing


def interrupted_start(script: str, place: Place, number: int) -> Row:
    """Ctrl-C while a new interpreter imports: no traceback, 130."""
    rng = random.Random(f"start/{script}/{number}")
    place.clear()
    at = rng.uniform(0, 8)
    command = [sys.executable, script, *RUNS[STARTS[script]].argv(place.inputs, place.out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    begun = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    maps = Path(f"/proc/{begun.pid}/maps")
    while begun.poll() is None and "libtorch" not in maps.read_text():  # before that, Python itself begins
        time.sleep(0.01)
    try:
        begun.wait(at)
    except subprocess.TimeoutExpired:
        begun.send_signal(signal.SIGINT)
    text, _ = begun.communicate(timeout=10 * trials.SECONDS)
    record = {"at": [round(at, 2)], "codes": [[begun.returncode]], "kills": int(begun.returncode != 0)}
    if "Traceback" in text:
        return record | {"outcome": "traceback", "shown": text[-3000:]}
    if begun.returncode not in (0, 130, -signal.SIGINT):
        return record | {"outcome": "wrong code", "shown": text[-3000:]}
    return record | {"outcome": "identical"}


def fuzzing(number: int) -> Row:
    """Inputs of all targets of `fuzz.py` in turn."""
    import contextlib
    import io

    from benchmarks import fuzz

    seed, names = 1000 + number, list(fuzz.TARGETS)
    fuzz.limit_memory()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        counts, first = fuzz.run(names, seed, lambda tried: tried >= FUZZED)
    record: Row = {"inputs": sum(counts.values()), "outcome": "identical"}
    if first:
        record |= {"outcome": "traceback", "shown": "; ".join(f"{name} (--seed {seed} --replay {name.partition(':')[0]}"
                                                              f":{at})" for name, at in first.items())}  # fmt: skip
    return record


# ------------------------------------------------------------------------------------------------------- the campaign


class Campaign:
    """The trials of a working folder, each in a process of its own.

    Args:
        work: the folder that inputs and outputs are in.
        output: the file of rows.
    """

    def __init__(self, work: Path, output: Path) -> None:
        self.work, self.output = work, output
        self.inputs = work / "inputs"
        self._known: dict[str, Known] = {}
        if not self.inputs.exists():
            staged = work / "inputs.partial"
            shutil.rmtree(staged, ignore_errors=True)
            made = trials.in_own_process(lambda: {"outcome": str(make_inputs(staged))})
            if made["outcome"] != "None":
                raise RuntimeError(made.get("shown", made))
            # The recipe names its folder.
            recipe = (staged / "recipe.yaml").read_text().replace(str(staged), str(self.inputs))
            (staged / "recipe.yaml").write_text(recipe)
            staged.rename(self.inputs)
        for record in work.glob("*/template-*.json"):  # where a trial was ended that had damaged inputs
            folder = Path(json.loads(record.read_text())["folder"])
            if self.inputs in folder.parents and (kept := record.with_suffix("")).exists():
                shutil.rmtree(folder, ignore_errors=True)
                shutil.copytree(kept, folder)

    def place(self, name: str) -> Place:
        folder = self.work / re.sub("[^a-z0-9]+", "-", name)
        folder.mkdir(parents=True, exist_ok=True)
        return Place(self.inputs, folder)

    def known(self, name: str) -> Known:
        """The files of a run that nothing disturbs; found out once."""
        if name not in self._known:
            if RUNS[name].needs_server and "CAMPAIGN_SERVER" not in os.environ:
                os.environ["CAMPAIGN_SERVER"] = serve(self.inputs / "model")
            place = self.place(name)
            found = trials.in_own_process(lambda: vars(trials.undisturbed(name, place)))
            if "left" not in found:
                raise RuntimeError(found.get("shown", found))
            self._known[name] = Known(**found)
        return self._known[name]

    def trials(self, only: Sequence[str], counts: dict[str, dict[str, int]]) -> Iterator[Trial]:
        """All trials; the kinds of a phase take turns, so that a campaign that is ended early has some of each."""
        for phase in PHASES:
            streams = [
                (count, self._stream(fault, what, count))
                for fault in phase
                for what, count in counts.get(fault, {}).items()
                if not only or fault in only or what in only
            ]
            turns = max((count for count, _ in streams), default=0)
            due = [0.0] * len(streams)
            for _ in range(turns):
                for index, (count, stream) in enumerate(streams):
                    due[index] += count / turns
                    while due[index] >= 1 - 1e-9:
                        due[index] -= 1
                        yield from itertools.islice(stream, 1)

    def _stream(self, fault: str, what: str, count: int) -> Iterator[Trial]:
        """The trials of one kind."""
        disturb = {"kill": trials.kill, "full disk": trials.full_disk, "removed": trials.removed,
                   "read-only": trials.read_only}  # fmt: skip
        if fault == "damage":
            try:
                found = damage(what, self.place(DAMAGED[what]), self.known(DAMAGED[what]))
                yield from itertools.islice(found, count)
            except RuntimeError as error:  # the others go on
                shown = str(error)
                yield f"damage: {what}: template", lambda: {"outcome": "trial failed", "shown": shown}
            return
        for number in range(count):
            title = f"{fault}: {what}: {number}"
            if fault == "start":
                yield title, functools.partial(interrupted_start, what, self.place(f"start {what}"), number)
            elif fault == "fuzz":
                yield title, functools.partial(fuzzing, number)
            else:
                yield title, functools.partial(self._disturbed, disturb[fault], what, title)

    def _disturbed(self, disturb: Callable[[str, Place, Known, random.Random], Row], what: str, title: str) -> Row:
        return disturb(what, self.place(what), self.known(what), random.Random(title))

    def run(
        self, only: Sequence[str], counts: dict[str, dict[str, int]], until: float, again: Sequence[str] = ()
    ) -> None:
        """Do what is not done yet, up to a moment of `time.monotonic`; and the trials `again`, in any case."""
        done = {row["trial"] for row in rows_so_far(self.output)} - set(again)
        for title, trial in self.trials(only, counts):
            if title in done or (again and title not in again):
                continue
            if time.monotonic() > until:
                return
            fault, what, *_ = title.split(": ")
            if fault in ("kill", "full disk", "removed", "read-only"):
                self.known(what)
            began = time.monotonic()
            row = trials.in_own_process(trial)
            row = {"trial": title, "fault": fault, "what": what, **row}
            row |= {"seconds": round(time.monotonic() - began, 2), "commit": commit()}
            if "shown" in row:
                failures = self.output.with_suffix(".failures.txt")
                with failures.open("a") as file:
                    file.write(f"=== {title}: {row['outcome']}\n{json.dumps(row)}\n{row['shown']}\n\n")
                row["shown"] = row["shown"][-300:]
                print(f"{title}: {row['outcome']}", flush=True)
            append_row(self.output, row)


def serve(model: Path) -> str:
    """Start a server of a model in a process that ends with this one; its address."""
    receive, send = os.pipe()
    if os.fork() == 0:
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        os.close(receive)
        from tests.helpers.completions_server import CompletionsServer

        server = CompletionsServer(str(model), "yarn:2")
        os.write(send, server.url.encode())
        os.close(send)
        server.serve_forever()
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        return pipe.read()


_COMMIT: list[str] = []


def commit() -> str:
    """The commit of the code that this process has imported."""
    if not _COMMIT:
        found = subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
        )
        _COMMIT.append(found.stdout.strip() or "unknown")
    return _COMMIT[0]


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row per fault and run: how many trials, kills and inputs, and how they ended.

    A trial that was done again counts with its last outcome; `mended` says how many had another one before.
    """
    last: dict[str, Row] = {}
    mended: Counter[tuple[str, str]] = Counter()
    for row in rows:
        before = last.get(row["trial"])
        if before is not None and before["outcome"] not in GOOD and row["outcome"] in GOOD:
            mended[row["fault"], row["what"]] += 1
        last[row["trial"]] = row
    found: dict[tuple[str, str], Row] = {}
    for row in last.values():
        one = found.setdefault((row["fault"], row["what"]), {
            "fault": row["fault"], "what": row["what"], "trials": 0, "kills": 0, "inputs": 0, "outcomes": {},
            "mended": mended[row["fault"], row["what"]], "seconds": 0.0, "commits": []})  # fmt: skip
        one["trials"] += 1
        one["kills"] += row.get("kills", 0)
        one["inputs"] += row.get("inputs", 0)
        one["outcomes"][row["outcome"]] = one["outcomes"].get(row["outcome"], 0) + 1
        one["seconds"] = round(one["seconds"] + row["seconds"], 1)
        one["commits"] = sorted({*one["commits"], row["commit"]})
    return list(found.values())


def write_summary(output: Path) -> None:
    """Write data/reliability_rows.jsonl from the rows of trials, with the machine."""
    from scaled_rope.provenance import cpu_name

    made = {"device": cpu_name(), "cpu_count": os.cpu_count(), "date": datetime.now(UTC).date().isoformat()}
    rows = [row | {"provenance": made} for row in summary(rows_so_far(output))]
    write_atomic(SUMMARY, "".join(json.dumps(row) + "\n" for row in rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("benchmarks/campaign.py", __doc__)
    parser.add_argument("--hours", type=float, default=3.0, help="begin no trial after that (default %(default)s)")
    parser.add_argument("--only", action="append", metavar="NAME",
                        help=f"of: {', '.join(COUNTS)}; or the name of a run")  # fmt: skip
    parser.add_argument("--again", action="append", metavar="TRIAL", help="do a trial of the file again; failed: all"
                                                                          " that were no good")  # fmt: skip
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "campaign", metavar="FOLDER")
    parser.add_argument("--summary", action="store_true", help="write the counts and stop")
    args = parser.parse_args(argv)
    if not args.hours > 0:
        raise ConfigError(f"--hours {args.hours:g} is not allowed; above 0")
    check_names("name", args.only, {*COUNTS, *(name for of in COUNTS.values() for name in of)})
    output = args.work / "trials.jsonl"
    if not args.summary:
        until = time.monotonic() + 3600 * args.hours
        for name in PRELOAD:
            importlib.import_module(name)
        args.work = args.work.absolute()
        again = list(args.again or ())
        if "failed" in again:
            last = {row["trial"]: row["outcome"] for row in rows_so_far(output)}
            again += [title for title, outcome in last.items() if outcome not in GOOD]
        Campaign(args.work, output).run(args.only or (), COUNTS, until, again)
    write_summary(output)
    found = Counter[str]()
    for row in summary(rows_so_far(output)):
        outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(row["outcomes"].items()))
        print(f"{row['fault']}, {row['what']}: {row['trials']} trials: {outcomes}")
        found.update(row["outcomes"])
    print(", ".join(f"{count} {outcome}" for outcome, count in found.most_common()))
    return int(any(outcome not in GOOD for outcome in found))


if __name__ == "__main__":
    sys.exit(run_cli(main))
