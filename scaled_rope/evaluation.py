"""What evaluators share: context lengths, resuming, progress, and the two forms in which results leave.

An evaluator says which cells (model x scaling x length) there are and measures them; `run` skips the cells that the
output already holds and appends every new row as soon as it is known.
"""

from __future__ import annotations

import argparse
import csv
import io
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from scaled_rope.errors import ConfigError
from scaled_rope.loading import ModelJob, ModelLoader
from scaled_rope.results import Row, append_row, finished_keys, provenance, read_rows, row_key, write_atomic


class Evaluator(Protocol):
    """One metric over (model, scaling, context length)."""

    value: str
    """The row field that tables and CSV files show."""

    def cells(self, job: ModelJob) -> dict[int, Row]:
        """Context length -> the fields that, with those of the job, identify what is measured there."""
        ...

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        """Length of a forward pass -> those of `lengths` that it yields."""
        ...

    def tokens(self, job: ModelJob, length: int) -> int:
        """Tokens that go through the model in the passes of one length; what the progress bar counts."""
        ...

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        """Do the passes of one length; give (context length, measured fields) and call `advance(tokens)` as it goes."""
        ...


def command_line(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> str:
    """The command that repeats a run; part of its rows' provenance."""
    return shlex.join(["python", parser.prog, *(sys.argv[1:] if argv is None else argv)])


def add_evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for context lengths, output and progress."""
    add = parser.add_argument_group("lengths and output").add_argument
    add("--lengths", metavar="L1,L2,...", help="context lengths in tokens, instead of the next three")
    add("--min-tokens", type=int, default=256, metavar="N", help="shortest context (default %(default)s)")
    add("--max-tokens", type=int, default=8192, metavar="N", help="longest context (default %(default)s)")
    add("--tokens-step", type=int, metavar="N", help="distance between contexts (default: each doubles the one before)")
    add("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: about 16k tokens' worth)")
    add("--output", default="out/eval/rows.jsonl", metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--output-file", metavar="CSV", help="also write a table: a line of lengths, then a line per model")
    add("--hide-progress", action="store_true")


def context_lengths(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for, ascending.

    Raises:
        ConfigError: not whole numbers of at least 2 tokens, or an empty range.
    """
    if args.batch_size is not None and args.batch_size < 1:
        raise ConfigError(f"batch size {args.batch_size} is not allowed; at least 1")
    if args.lengths is not None:
        try:
            lengths = sorted({int(part) for part in args.lengths.split(",")})
        except ValueError as error:
            raise ConfigError(f"lengths {args.lengths!r} is not allowed; whole numbers, separated by commas") from error
    else:
        low, high, step = args.min_tokens, args.max_tokens, args.tokens_step
        if low > high or low < 2:
            raise ConfigError(f"min-tokens {low} with max-tokens {high} is not allowed; 2 <= min-tokens <= max-tokens")
        if step is not None and step < 1:
            raise ConfigError(f"tokens-step {step} is not allowed; at least 1")
        if step is None:
            lengths = [low << doublings for doublings in range((high // low).bit_length())]
            lengths = sorted({*lengths, high})
        else:
            lengths = list(range(low, high + 1, step))
    if lengths[0] < 2:
        raise ConfigError(f"length {lengths[0]} is not allowed; at least 2 tokens, the first of which has no context")
    return lengths


def batch_size(args: argparse.Namespace, length: int) -> int:
    """Sequences per forward pass of `length` tokens."""
    return int(args.batch_size) if args.batch_size else max(1, 16384 // length)


def run(
    evaluator: Evaluator, jobs: Sequence[ModelJob], args: argparse.Namespace, command: str, seed: int | None = None
) -> dict[ModelJob, dict[int, Row]]:
    """Measure every cell that `args.output` does not hold yet; give the rows of all cells by job and length.

    Rows are appended as they are measured. The CSV file, if any, is rewritten after every job, so it is there, with
    empty places, before the last one ends.
    """
    finished = finished_keys(args.output)
    cells = {job: evaluator.cells(job) for job in jobs}
    identities = {
        job: {length: {**job.fields(), **cell, "length": length} for length, cell in cells[job].items()} for job in jobs
    }
    plan = {}
    for job in jobs:
        missing = {length: key for length, row in identities[job].items() if (key := row_key(row)) not in finished}
        finished |= set(missing.values())  # two jobs may name the same scaling
        plan[job] = evaluator.passes(job, list(missing))
    total = sum(evaluator.tokens(job, length) for job in jobs for length in plan[job])
    load = ModelLoader(args)
    given = {name: value for name, value in vars(args).items() if value is not None and value is not False}
    record = {"command": command, **provenance(load.device, seed, given)}
    with tqdm(
        total=total,
        unit="tok",
        unit_scale=True,
        disable=args.hide_progress or not total,
        mininterval=0.5 if sys.stderr.isatty() else 10,
    ) as bar:
        for job in jobs:
            bar.set_description(job.name)
            for length, yields in plan[job].items():
                for measured, result in evaluator.measure(load(job), job, length, yields, bar.update):
                    append_row(args.output, {**identities[job][measured], **result, "provenance": record})
            if args.output_file and plan[job]:
                _write_csv(args.output_file, evaluator.value, jobs, _collect(args.output, identities))
    rows = _collect(args.output, identities)
    if args.output_file:
        _write_csv(args.output_file, evaluator.value, jobs, rows)
    return rows


def _collect(path: str, identities: Mapping[ModelJob, Mapping[int, Row]]) -> dict[ModelJob, dict[int, Row]]:
    """The measured rows in the file, by job and length."""
    known = {row_key(row): row for row in read_rows(path)} if Path(path).exists() else {}
    return {
        job: {length: known[row_key(row)] for length, row in cells.items() if row_key(row) in known}
        for job, cells in identities.items()
    }


def _write_csv(path: str, value: str, jobs: Sequence[ModelJob], rows: Mapping[ModelJob, Mapping[int, Row]]) -> None:
    """The layout of the released result files: `,L1,L2,...`, then `name,value,value,...` per model."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *lengths])
    for job in jobs:
        name = job.model if job.carried else f"{job.model} {job.label}"
        writer.writerow([name, *(rows[job].get(length, {}).get(value, "") for length in lengths)])
    write_atomic(path, text.getvalue())


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Plain text with aligned columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in [header, rule, *lines]
    )


def format_perplexity(value: float | None) -> str:
    """A perplexity in a table."""
    return "overflow" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def print_summary(title: str, rows: Mapping[ModelJob, Mapping[int, Row]], show: Callable[[Row], str]) -> None:
    """The final table in the terminal: a line per job, a column per context length."""
    lengths = sorted({length for cells in rows.values() for length in cells})
    lines = [
        [job.name, *(show(cells[length]) if length in cells else "" for length in lengths)]
        for job, cells in rows.items()
    ]
    print(f"\n{title}\n{format_table(['', *map(str, lengths)], lines)}")
