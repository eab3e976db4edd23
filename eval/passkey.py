"""Passkey retrieval: can the model repeat a number that was hidden in a long, dull text?

    python eval/passkey.py -m MODEL --scaling yarn:8 --lengths 256,1024,4096 --iterations 10

A prompt and its answer together have exactly the given number of tokens. Depths lie on a uniform grid from the start
to the end of the filler (or are drawn uniformly as in the released script, `--depths random`), keys and depths follow
from the seed. An answer is right when the model's most likely token is the key's at every answer position. One pass
over prompt and answer decides that: up to the first mistake its context is exactly what greedy decoding would have
built, and after it the answer is wrong either way. Under dynamic scaling that pass uses the scale at the prompt's end,
the one of the first decoding step.

`--wording` chooses the words around the number: `passkey` are those of the released script, `needle` are others, which
say it once and in other filler, so that a model cannot answer from having been trained on the first. `--seeds` asks
with several draws of the prompts; reports count them together.

As in table 5 of the paper, the *passkey context* is the largest length with at least 80 % of the keys found, and the
accuracy beside it the mean over the lengths up to it.

Prompts of one length begin alike, up to the shallower key. `--shared-prefill` reads the common part once and keeps its
keys and values: a third of the tokens less with keys on a grid. It is a choice and not the default, because it changes
the order of summation (float32 states differ by 3e-6, bfloat16 ones by 0.02), so near ties fall differently, prompts
are not batched any more, and a pass holds a cache that it does without otherwise: 69 GB for Llama 2 7B at 128k.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError, unknown
from scaled_rope.flags.evaluators import (
    add_evaluation_arguments,
    add_model_arguments,
    add_server_arguments,
    batch_size,
    check_model_arguments,
    check_server_arguments,
    context_lengths,
)
from scaled_rope.flags.shared import check_least

DEPTHS = ("grid", "random")
WORDINGS = ("passkey", "needle")  # the keys of the evaluator's table, which is not read before flags are checked
SEED = 42


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/passkey.py", __doc__ or "")
    add_model_arguments(parser)
    add_server_arguments(parser)
    add = parser.add_argument_group("prompts").add_argument
    add("--iterations", type=int, default=20, metavar="N", help="prompts per length (default %(default)s)")
    add("--depths", choices=DEPTHS, default="grid", help="where the key stands (default %(default)s)")
    add("--shared-prefill", action="store_true", help="read what prompts have in common once, see above")
    add("--wording", action="append", metavar="NAME", help=f"{', '.join(WORDINGS)}; repeat or separate by commas for "
                                                            f"several (default {WORDINGS[0]})")  # fmt: skip
    add("--seed", type=int, help=f"keys and random depths follow from it (default {SEED})")
    add("--seeds", metavar="N,N,…", help="several of them, each with as many prompts")
    add("--fixed-length", type=int, metavar="N", help="= --lengths N")
    add("--length-step", type=int, help=argparse.SUPPRESS)  # searched for the length in characters; ours is exact
    add("--chat-template", action="store_true", help="put prompts into the chat template of the model's tokenizer")
    add("--heatmap", metavar="FILE", help="also draw what was found by length and depth (.svg or .png)")
    add_evaluation_arguments(parser)
    return parser


def wordings_of(args: argparse.Namespace) -> list[str]:
    """The wordings that the flags name, each once.

    Raises:
        ConfigError: an unknown one.
    """
    names = [name.strip() for text in args.wording or [WORDINGS[0]] for name in text.split(",")]
    for name in names:
        if name not in WORDINGS:
            raise unknown("wording", name, WORDINGS)
    return list(dict.fromkeys(names))


def seeds_of(args: argparse.Namespace) -> list[int]:
    """The seeds that the flags name.

    Raises:
        ConfigError: both flags, something that is no whole number of at least 0, or one of them twice.
    """
    check_least(args, seed=0)
    if args.seeds is None:
        return [SEED if args.seed is None else args.seed]
    if args.seed is not None:
        raise ConfigError("give either --seed or --seeds")
    try:
        seeds = [int(text) for text in args.seeds.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {args.seeds} is not allowed; whole numbers, separated by commas") from None
    if min(seeds) < 0:
        raise ConfigError(f"--seeds {args.seeds} is not allowed; each at least 0")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {args.seeds} is not allowed; each seed once")
    return seeds


def check_arguments(args: argparse.Namespace) -> list[int]:
    """Check the flags and return the context lengths that they ask for."""
    check_model_arguments(args)
    check_server_arguments(args)
    wordings_of(args)
    seeds_of(args)
    check_least(args, iterations=1)
    if args.fixed_length is not None:
        if args.lengths is not None:
            raise ConfigError("give either --fixed-length or --lengths")
        args.lengths = str(args.fixed_length)
    return context_lengths(args)


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.evaluation.chat_templates import print_chat_notes
from scaled_rope.evaluation.failures import Failure
from scaled_rope.evaluation.jobs import model_jobs
from scaled_rope.evaluation.passkey_evaluator import Passkey
from scaled_rope.evaluation.passkey_trials import run_trials
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import command_line, given_arguments, print_output
from scaled_rope.report.drawing import check_format
from scaled_rope.report.heatmap import Panel, save_heatmap


def evaluators_of(args: argparse.Namespace) -> dict[str, list[Passkey]]:
    """Make the evaluators that the flags ask for: by wording, one per seed. The only wording is named ""."""
    lengths = check_arguments(args)
    if args.heatmap is not None:
        check_format(Path(args.heatmap))
    wordings = wordings_of(args)
    return {
        wording if len(wordings) > 1 else "": [
            Passkey(
                lengths=lengths,
                iterations=args.iterations,
                seed=seed,
                rows_per_pass=functools.partial(batch_size, args),
                wording=wording,
                depths=args.depths,
                shared_prefill=args.shared_prefill,
                chat_template=args.chat_template,
            )
            for seed in seeds_of(args)
        ]
        for wording in wordings
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluators = evaluators_of(args)
    failures: list[Failure] = []
    jobs = model_jobs(args, failures)
    print_chat_notes((job.model for job in jobs), args.chat_template)
    found, code = run_trials(
        evaluators,
        jobs,
        args,
        command_line(parser, argv),
        given_arguments(args),
        "passkeys found, by context length (tokens)",
        lambda row: f"{row['right']}/{row['n']}",
        failures,
    )
    if args.heatmap is not None and current().is_first:
        panels = [
            Panel.of_rows(
                ", ".join(filter(None, [job.name, wording])), cells, job.scaling.original_max_position_embeddings
            )
            for wording, rows in found.items()
            for job, cells in rows.items()
        ]
        save_heatmap(args.heatmap, panels)
        print(f"\nheat map: {args.heatmap}")
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
