"""QuALITY: questions with four answers each about long stories, by the likelihood of the answer's letter.

    python eval/quality.py -m MODEL --scaling yarn:8 --max-tokens 8192 --limit 200
    python eval/quality.py -m MODEL --dataset questions.jsonl --print-choices

The prompt has the wording of ZeroSCROLLS and ends in "Answer: (". The letter with the highest log-likelihood as a
continuation of that is the model's choice, each letter being scored in the tokens in which the tokenizer really writes
it there (scaled_rope/evaluation/choice_prompts.py). Under a scaling that depends on the length, a question's passes use
the scale at its prompt's end. Guessing gives 25 %.

With `--max-tokens` prompt and letter have at most so many tokens. As in ZeroSCROLLS, the end of a longer story is cut
off and a note says so, while the question stays whole; `--too-long drop` leaves such questions out instead, as the
released script did. A file for `--dataset` has one JSON object per line: article, question, options (four texts) and
answer (0 to 3, or a letter).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.flags.evaluators import add_model_arguments, check_model_arguments, check_output_apart
from scaled_rope.flags.shared import Unsaid, check_least, said
from scaled_rope.texts.documents import check_split, check_there, expanded

TOO_LONG = ("cut", "drop")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/quality.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("questions").add_argument
    source = "a .jsonl file or a hub name"
    add("-d", "--dataset", default="emozilla/quality", type=expanded, metavar="NAME",
        help=f"{source} (default %(default)s)")  # fmt: skip
    add("--split", default=Unsaid("validation"), help="split of a hub dataset (default %(default)s)")
    add("--limit", type=int, metavar="N", help="the first N questions (default: all)")
    add("--max-tokens", type=int, metavar="N", help="longest prompt in tokens, letter included (default: no limit)")
    add("--too-long", choices=TOO_LONG, default="cut", help="what to do with a longer one (default %(default)s)")
    add("--chat-template", action="store_true", help="put prompts into the chat template of the model's tokenizer")
    add = parser.add_argument_group("output").add_argument
    add("--print-choices", action="store_true", help="print the choice and the right answer of every question")
    add("--output", default="out/eval/rows.jsonl", metavar="FILE", help="rows are appended here (default %(default)s)")
    add("--output-file", metavar="CSV", help="also write a line of names and a line of accuracies")
    add("--retry-oom", action="store_true", help="measure again what did not fit into memory in an earlier run")
    add("--hide-progress", action="store_true")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags; raise ConfigError on those that cannot be used."""
    check_model_arguments(args)
    check_least(args, limit=1, max_tokens=1)
    check_there(args.dataset)
    check_split(args.dataset, said(args.split))
    check_output_apart(args, [args.dataset])


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.evaluation.chat_templates import print_chat_notes
from scaled_rope.evaluation.failures import Failure, report_failures
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.evaluation.quality_evaluator import Quality, describe_choices, write_accuracies
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import command_line, print_output, print_summary, run
from scaled_rope.evaluation.statistics import format_share


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(args)
    evaluator = Quality(
        dataset=args.dataset,
        split=args.split,
        limit=args.limit,
        max_tokens=args.max_tokens,
        too_long=args.too_long,
        chat_template=args.chat_template,
    )
    failures: list[Failure] = []
    jobs = model_jobs(args, failures)
    print_chat_notes((job.model for job in jobs), args.chat_template)
    table, args.output_file = args.output_file, None  # `run` would write one line per model
    rows = run(evaluator, jobs, args, command_line(parser, argv), None, failures)
    code = report_failures(failures, jobs, output=args.output, metric="quality")
    if args.print_choices:
        for line in describe_choices(rows):
            print(line)
    if table is not None and current().is_first:
        write_accuracies(table, jobs, rows)
    print_summary("QuALITY answers right, with 95 % intervals, by longest prompt (tokens)", rows, format_share)
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
