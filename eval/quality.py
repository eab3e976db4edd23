"""QuALITY: questions with four answers each about long stories, by the likelihood of the answer's letter.

    python eval/quality.py -m MODEL --scaling yarn:8 --max-tokens 8192 --limit 200
    python eval/quality.py -m MODEL --dataset questions.jsonl --print-choices

The prompt has the wording of ZeroSCROLLS and ends in "Answer: (". The letter with the highest log-likelihood as a
continuation of that is the model's choice, each letter being scored in the tokens in which the tokenizer really writes
it there (scaled_rope/choice.py). Under a scaling that depends on the length, a question's passes use the scale at its
prompt's end. Guessing gives 25 %.

With `--max-tokens` prompt and letter have at most so many tokens. As in ZeroSCROLLS, the end of a longer story is cut
off and a note says so, while the question stays whole; `--too-long drop` leaves such questions out instead, as the
released script did. A file for `--dataset` has one JSON object per line: article, question, options (four texts) and
answer (0 to 3, or a letter).
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.flags import add_model_arguments, check_model_arguments
from scaled_rope.results import Row, write_atomic

TOO_LONG = ("cut", "drop")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/quality.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("questions").add_argument
    source = "a .jsonl file or a hub name"
    add("-d", "--dataset", default="emozilla/quality", metavar="NAME", help=f"{source} (default %(default)s)")
    add("--split", default="validation", help="split of a hub dataset (default %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N questions (default: all)")
    add("--max-tokens", type=int, metavar="N", help="longest prompt in tokens, letter included (default: no limit)")
    add("--too-long", choices=TOO_LONG, default="cut", help="what to do with a longer one (default %(default)s)")
    add = parser.add_argument_group("output").add_argument
    add("--print-choices", action="store_true", help="print the choice and the right answer of every question")
    add("--output", default="out/eval/rows.jsonl", metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--output-file", metavar="CSV", help="also write a line of names and a line of accuracies")
    add("--retry-oom", action="store_true", help="measure again what did not fit into memory in an earlier run")
    add("--hide-progress", action="store_true")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done."""
    check_model_arguments(args)
    for name in ("limit", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed; at least 1")


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.choice_prompts import (
    LETTERS,
    ChoicePrompt,
    build_choice_prompt,
    read_questions,
    score_letters,
)
from scaled_rope.evaluation.jobs import ModelJob, model_jobs
from scaled_rope.evaluation.runner import Failure, command_line, print_summary, report_failures, run
from scaled_rope.evaluation.statistics import format_share, tally
from scaled_rope.patching.loading import apply_scaling
from scaled_rope.scaling.frequencies import at_length


class Quality:
    """The evaluator; see the module's docstring for what it measures."""

    value = "accuracy"

    def __init__(self, args: argparse.Namespace) -> None:
        check_arguments(args)
        self.args = args
        self._prompts = functools.cache(self._prompts_of)

    def _prompts_of(self, model: str) -> list[ChoicePrompt]:
        args, tokenizer = self.args, load_tokenizer(model)
        prompts: list[ChoicePrompt] = []
        read = 0
        for question in read_questions(args.dataset, args.split):
            prompt = build_choice_prompt(tokenizer, question, args.max_tokens if args.too_long == "cut" else None)
            read += 1
            if args.max_tokens is None or prompt.length <= args.max_tokens:
                prompts.append(prompt)
            if len(prompts) == args.limit:
                break
        if not prompts:
            why = f"all {read} questions are longer than {args.max_tokens} tokens" if read else "it holds no questions"
            raise ConfigError(f"dataset {args.dataset!r} cannot be used: {why}")
        return prompts

    def cells(self, job: ModelJob) -> dict[int, Row]:
        prompts = self._prompts(job.model)
        digest = hashlib.sha256()
        for prompt in prompts:
            digest.update(json.dumps([prompt.context, prompt.letters, prompt.answer]).encode())
        name = self.args.dataset if not Path(self.args.dataset).is_file() else Path(self.args.dataset).name
        cell = {
            "metric": "quality",
            "data": {"name": name, "fingerprint": digest.hexdigest()[:16], "questions": len(prompts)},
            "protocol": {
                "name": "letter-likelihood",
                "max_tokens": self.args.max_tokens,
                "too_long": self.args.too_long,
            },
        }
        return {self.args.max_tokens or max(prompt.length for prompt in prompts): cell}

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        return {length: [length] for length in lengths}

    def tokens(self, job: ModelJob, length: int) -> int:
        return sum(prompt.length for prompt in self._prompts(job.model))

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        prompts = self._prompts(job.model)
        questions = []
        for prompt in prompts:
            apply_scaling(model, at_length(job.scaling, len(prompt.context)))
            scores = score_letters(model, prompt)
            choice = scores.index(max(scores))
            questions.append(
                {
                    "choice": LETTERS[choice],
                    "answer": LETTERS[prompt.answer],
                    "right": choice == prompt.answer,
                    "scores": [round(score, 4) for score in scores],
                    "tokens": prompt.length,
                    "cut": prompt.cut,
                }
            )
            advance(prompt.length)
        cut = sum(prompt.cut for prompt in prompts)
        yield length, {**tally([one["right"] for one in questions]), "cut": cut, "questions": questions}


def write_table(path: str, jobs: Sequence[ModelJob], rows: dict[ModelJob, dict[int, Row]]) -> None:
    """The layout of the released result files: a line of names, a line of accuracies; empty where there is none."""
    cells = [next(iter(rows[job].values()), {}) for job in jobs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([job.model if job.carried else f"{job.model} {job.label}" for job in jobs])
    writer.writerow([row.get("accuracy", "") for row in cells])
    write_atomic(path, text.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluator = Quality(args)
    jobs = model_jobs(args)
    table, args.output_file = args.output_file, None  # `run` would write one line per model
    failures: list[Failure] = []
    rows = run(evaluator, jobs, args, command_line(parser, argv), None, failures)
    code = report_failures(failures, jobs)
    if args.print_choices:
        for job, cells in rows.items():
            for row in cells.values():
                print(f"\n{job.name}")
                for number, one in enumerate(row.get("questions", ()), 1):
                    scores = " ".join(f"{letter} {s:.2f}" for letter, s in zip(LETTERS, one["scores"], strict=True))
                    print(f"{number}: choice {one['choice']}, answer {one['answer']} ({scores})")
    if table is not None:
        write_table(table, jobs, rows)
    print_summary("QuALITY answers right, with 95 % intervals, by longest prompt (tokens)", rows, format_share)
    print(f"\nrows: {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
