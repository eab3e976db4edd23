"""Talk to a model under a scaling: each line that is typed is a prompt, the answer appears as it is made.

    python eval/prompt_loop.py -m MODEL --scaling yarn:8
    python eval/prompt_loop.py -m MODEL --scaling yarn:8 --input-file book.txt      # each line is asked about the book
    echo "The sea was" | python eval/prompt_loop.py -m MODEL --temperature 0.8

Prompts don't remember one another. With `--input-file` the file comes first and the line that was typed after it; Enter
alone asks for the file as it is, which is read again every time. Ctrl-C stops an answer, Ctrl-D leaves. Decoding is
greedy unless `--temperature` or `--top-k` asks for drawing. In a pipe, prompts are the lines of standard input (with
`--input-file`, and no line, the file alone), only answers go to standard output, and notes to standard error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.typed_prompts import prompts, read_file, typed_lines
from scaled_rope.flags.evaluators import add_model_arguments, check_model_arguments


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/prompt_loop.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("prompts and answers").add_argument
    add("--input-file", metavar="FILE", help="text in front of every prompt")
    add("--chat-template", action="store_true", help="put prompts into the chat template of the model's tokenizer")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer in tokens (default %(default)s)")
    add("--temperature", type=float, metavar="T", help="draw tokens at this temperature (0: greedy)")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (at temperature 1 if none is given)")
    add("--repetition-penalty", type=float, metavar="P", help="divide the logits of tokens that were there by P (> 1)")
    add("--penalty-alpha", type=float, help=argparse.SUPPRESS)
    add("--seed", type=int, default=42, help="what is drawn follows from it (default %(default)s)")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Check the flags before a model is read; raise ConfigError on those that cannot be used."""
    check_model_arguments(args)
    if args.penalty_alpha is not None and args.penalty_alpha != 0:
        raise ConfigError(
            f"--penalty-alpha {args.penalty_alpha:g} is not available: transformers gave up contrastive search and "
            "fetches it as code from the hub; use --repetition-penalty or --temperature"
        )
    for name, fits, allowed in (
        ("max_new_tokens", lambda n: n >= 1, "at least 1"),
        ("temperature", lambda t: t == 0 or 1e-3 <= t <= 1e3, "0, or 0.001 to 1000"),
        ("top_k", lambda k: k >= 1, "at least 1"),
        ("repetition_penalty", lambda p: 1e-3 <= p <= 1e3, "0.001 to 1000"),
        ("seed", lambda n: 0 <= n < 2**64, "0 to 18446744073709551615"),
    ):
        value = getattr(args, name)
        if value is not None and not fits(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not allowed; {allowed}")
    if args.input_file is not None:
        read_file(args.input_file)


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from transformers.utils import logging as transformers_logging

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.chat_templates import chat_turn, print_chat_notes
from scaled_rope.evaluation.jobs import ModelLoader, model_jobs
from scaled_rope.evaluation.ranks import refuse_several
from scaled_rope.evaluation.streamed_answers import Decoding, answerer


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    check_arguments(args)
    refuse_several("prompt_loop.py")
    jobs = model_jobs(args)
    if len(jobs) != 1:
        raise ConfigError(f"give one model and one scaling; the flags name {len(jobs)}: {jobs[0].name}; {jobs[1].name}")
    (job,) = jobs
    transformers_logging.set_verbosity_error()  # its reminder that a model was trained on less is what we came for
    decoding = Decoding(args.max_new_tokens, args.temperature, args.top_k, args.repetition_penalty, args.seed)
    tokenizer = load_tokenizer(job.model)
    if args.chat_template:
        chat_turn(tokenizer)  # raises the error before weights are read
    print_chat_notes([job.model], args.chat_template)
    answer = answerer(ModelLoader(args)(job), tokenizer, job, decoding, args.chat_template)
    if sys.stdin.isatty():
        print(f"{job.name}. Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    for prompt in prompts(args.input_file, typed_lines()):
        answer(prompt)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
