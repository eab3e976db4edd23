"""Passkey retrieval from natural text: several numbered keys, one of which is asked for.

    python eval/passkey_hard.py -m MODEL --scaling yarn:8 --dataset books/ --fixed-length 8192 --num-keys 5

The keys of a prompt differ from one another. They stand at depths that are drawn uniformly, are numbered in the order
of the text, and one of them, drawn too, is asked for: one question per prompt, so that the prompts are independent
trials and the interval of the accuracy means what it says. Prompt and answer together have exactly the given number of
tokens. The text is the documents one after the other; each prompt takes the next stretch of it, and when all was used
they begin again at the start. Keys, depths and questions follow from the seed.

An answer is right when the first integer that greedy decoding gives within 10 tokens is the key. With
`--restrict-tokens true` only digits, blanks and the end may be decoded, so that a model can't begin with other words.
Decoding ends as soon as the answer can't change any more between right and wrong; it needs no cache, see
scaled_rope/evaluation/decoding.py. Scalings that depend on the length are given a scale of their own at each step, and
are decoded through the model's cache, as generation is; with `--uncached` each of their tokens is that of a full pass
over the text, which takes no memory for keys and about as many passes as the answer has tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.files import write_atomic
from scaled_rope.flags.evaluators import (
    add_evaluation_arguments,
    add_model_arguments,
    add_server_arguments,
    batch_size,
    check_model_arguments,
    check_output_apart,
    check_server_arguments,
    context_lengths,
)
from scaled_rope.flags.shared import Unsaid, check_least, said
from scaled_rope.texts.documents import check_feature, check_split, check_there, expanded

FIXED_LENGTH = 8192
RED_PAJAMA = "togethercomputer/RedPajama-Data-1T-Sample"


class _Default(int):
    """The type of a default, which tells it apart from the same number given by the user."""


def true_or_false(text: str) -> bool:
    """A yes or no from the command line."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise ConfigError(f"{text!r} is not allowed; true or false")
    return words[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/passkey_hard.py", __doc__ or "")
    add_model_arguments(parser)
    add_server_arguments(parser)
    add = parser.add_argument_group("text").add_argument
    source = "a .txt, .jsonl or .parquet file, a folder of these, a hub name or standin:NAME"
    add("-d", "--dataset", default=RED_PAJAMA, type=expanded, metavar="NAME", help=f"{source} (default %(default)s)")
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default=Unsaid("train"), help="split of a hub dataset (default %(default)s)")
    add = parser.add_argument_group("prompts").add_argument
    add("--num-keys", type=int, default=1, metavar="N", help="keys per prompt (default %(default)s)")
    add("--iterations", type=int, default=20, metavar="N", help="prompts per length (default %(default)s)")
    add("--seed", type=int, default=42, help="keys, depths and questions follow from it (default %(default)s)")
    choice: dict[str, Any] = {"type": true_or_false, "nargs": "?", "metavar": "true|false"}
    words = "decode digits, blanks and the end only (default true)"
    add("--restrict-tokens", **choice, default=True, const=True, help=words)
    add("--uncached", action="store_true", help="no cache under scalings that depend on the length, see above")
    add("--fixed-length", type=int, metavar="N", help=f"= --lengths N (default {FIXED_LENGTH}, if none of the next)")
    add("--chat-template", action="store_true", help="put prompts into the chat template of the model's tokenizer")
    add("--heatmap", metavar="FILE", help="also draw what was found by length and depth (.svg or .png)")
    add_evaluation_arguments(parser)
    for name in ("min_tokens", "max_tokens"):
        parser.set_defaults(**{name: _Default(parser.get_default(name))})
    parser.conflict_handler = "resolve"
    add = parser.add_argument_group("more output").add_argument
    add("--output-file", metavar="JSON", help="also write the keys, depths and answers of every prompt")
    return parser


def lengths_of(args: argparse.Namespace) -> list[int]:
    """The context lengths that the flags ask for; by default `FIXED_LENGTH` alone."""
    unsaid = isinstance(args.min_tokens, _Default) and isinstance(args.max_tokens, _Default)
    if args.fixed_length is not None and args.lengths is not None:
        raise ConfigError("give either --fixed-length or --lengths")
    if args.fixed_length is not None or (args.lengths is None and args.tokens_step is None and unsaid):
        args.lengths = str(FIXED_LENGTH if args.fixed_length is None else args.fixed_length)
    return context_lengths(args)


def check_arguments(args: argparse.Namespace) -> list[int]:
    """Check the flags and return the context lengths that they ask for."""
    check_model_arguments(args)
    check_server_arguments(args)
    check_there(args.dataset)
    check_split(args.dataset, said(args.split))
    check_feature([args.dataset], args.feature)
    check_output_apart(args, [args.dataset])
    check_least(args, iterations=1, num_keys=1, seed=0)
    return lengths_of(args)


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.evaluation.chat_templates import print_chat_notes
from scaled_rope.evaluation.failures import Failure
from scaled_rope.evaluation.hard_passkey_evaluator import HardPasskey
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.evaluation.passkey_trials import run_trials
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import command_line, given_arguments, print_output
from scaled_rope.evaluation.statistics import format_share
from scaled_rope.report.drawing import check_format
from scaled_rope.report.heatmap import Panel, save_heatmap


def evaluator_of(args: argparse.Namespace) -> HardPasskey:
    """Make the evaluator that the flags ask for."""
    lengths = check_arguments(args)
    if args.heatmap is not None:
        check_format(Path(args.heatmap))
    return HardPasskey(
        lengths=lengths,
        iterations=args.iterations,
        seed=args.seed,
        rows_per_pass=functools.partial(batch_size, args),
        num_keys=args.num_keys,
        dataset=args.dataset,
        feature=args.feature,
        split=args.split,
        restrict_tokens=args.restrict_tokens,
        uncached=args.uncached,
        chat_template=args.chat_template,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluator = evaluator_of(args)
    failures: list[Failure] = []
    jobs = model_jobs(args, failures)
    print_chat_notes((job.model for job in jobs), args.chat_template)
    command, given = command_line(parser, argv), given_arguments(args)
    answers_file, args.output_file = args.output_file, None  # `run` would write a CSV file
    keys = f"{args.num_keys} key{'s' if args.num_keys > 1 else ''} in {args.dataset}"
    title = f"passkeys found, {keys}, with 95 % intervals, by context length (tokens)"
    found, code = run_trials({"": [evaluator]}, jobs, args, command, given, title, format_share, failures)
    rows = found[""]
    if args.heatmap is not None and current().is_first:
        panels = [
            Panel.of_rows(job.name, cells, job.scaling.original_max_position_embeddings) for job, cells in rows.items()
        ]
        save_heatmap(args.heatmap, panels)
        print(f"\nheat map: {args.heatmap}")
    if answers_file is not None and current().is_first:
        found = [{**row, "name": job.name} for job, cells in rows.items() for row in cells.values()]
        write_atomic(answers_file, json.dumps(found, indent=1) + "\n")
        print(f"\nanswers: {answers_file}")
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
