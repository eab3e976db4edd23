"""LongPPL: perplexity over the tokens that only far context predicts (arXiv 2410.23771).

    python eval/longppl.py --evaluator BASE --evaluator-scaling yarn:8 -m BASE -m out/mine/model \
        --dataset FOLDER --lengths 4096,16384

One model, the evaluator, predicts each token of the texts twice: with the whole context, and with the last K tokens
only (windows of K that begin every K/4 tokens). Key tokens are those that gain more than 2 nats by the whole context
and then have a log-probability above -2. LongPPL of each tested model is exp of its mean loss over them. The same
evaluator has to choose for all models that are compared, so it is named apart, and is in each row; it should be a model
that does use its context, such as the longest-context model at hand. All models must have its tokenizer.

The losses of all models are kept in a folder beside the rows, or in `--save-nll DIR`, which eval/perplexity.py can
share. A further tested model costs one pass over the texts, and a further length up to the longest nothing.

Data sets are .txt, .jsonl or .parquet files, folders of these, hub names, packed sets, or standin:NAME for texts from
package archives (python -m scaled_rope.texts.corpora list).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from scaled_rope.checkpoint import check_local
from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.statistics import SEED
from scaled_rope.files import check_writable
from scaled_rope.flags.evaluators import (
    add_evaluation_arguments,
    add_model_arguments,
    add_text_arguments,
    batch_size,
    check_losses_folder,
    check_model_arguments,
    check_text_arguments,
    context_lengths,
)
from scaled_rope.flags.shared import check_least
from scaled_rope.scaling.resolve import check_spec
from scaled_rope.texts.token_documents import TokenSource

WINDOW = 4096
"""K of the paper; a model that was trained on less takes that."""

_MOST = 1e6
"""The largest gain and log-probability in nats that flags may name: no token has such."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/longppl.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("evaluator").add_argument
    add(
        "--evaluator", required=True, metavar="NAME", help="the model that chooses the key tokens, for all models alike"
    )
    add("--evaluator-scaling", default="checkpoint", metavar="SPEC", help="its scaling (default: its own)")
    add(
        "--key-window", type=int, metavar="K", help=f"the cut context (default {WINDOW}, or its trained length if less)"
    )
    add("--key-stride", type=int, metavar="S", help="distance between windows of the cut context (default: K/4)")
    add("--key-gain", type=float, default=2.0, metavar="A", help="least gain in nats (default %(default)s)")
    add("--key-floor", type=float, default=-2.0, metavar="B", help="least log-probability (default %(default)s)")
    add_text_arguments(parser)
    add = parser.add_argument_group("more output").add_argument
    add("--save-nll", metavar="DIR", help="every token's loss is kept there (default: beside --output)")
    add("--figure", metavar="FILE", help="draw where in the texts the evaluator gains by far context (.svg or .png)")
    add_evaluation_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> list[TokenSource]:
    """Check the flags and return the data sets."""
    check_model_arguments(args)
    check_text_arguments(args)
    context_lengths(args)
    check_local(args.evaluator)
    check_spec(args.evaluator_scaling)
    check_least(args, key_window=2, key_stride=1)
    if not 0 < args.key_gain <= _MOST:  # else tokens within the cut context, whose gain is 0, were key tokens
        raise ConfigError(f"--key-gain {args.key_gain} is not allowed; above 0 nats, at most {_MOST:g}")
    if not -_MOST <= args.key_floor < 0:
        raise ConfigError(
            f"--key-floor {args.key_floor} is not allowed; below 0, the logarithm of certainty, {-_MOST:g} or more"
        )
    check_losses_folder(args.save_nll)
    if args.figure is not None:
        check_writable(args.figure)
    names = dict.fromkeys(args.dataset or args.tokenized)
    return [TokenSource(name, bool(args.tokenized), args.feature, args.split, args.subset) for name in names]


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.

from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.controls import ControlRequest
from scaled_rope.evaluation.failures import Failure, report_failures
from scaled_rope.evaluation.formatting import format_perplexity
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader, model_jobs
from scaled_rope.evaluation.long_perplexity import METRIC, KeyRule, KeyTokens, LongPerplexity
from scaled_rope.evaluation.perplexity_evaluator import Perplexity
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import Parts, command_line, print_output, print_summary, run_all
from scaled_rope.progress import Progress
from scaled_rope.report.drawing import check_format
from scaled_rope.report.gains import excerpts, save_gains, strips
from scaled_rope.results import Row


def evaluator_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The flags of the evaluator: its own model and scaling, and none that change the tested models.

    Precision and quantisation are those of the tested models, since all have to fit into the same memory.
    """
    given = {"model": [args.evaluator], "scaling": [args.evaluator_scaling], "adapter": None, "no_effect": None}
    apart = {"layers": None, "drop_layers": None, "factor": None, "finetuned": False, "sliding_window_attention": None}
    parameters = dict.fromkeys(("window", "group", "chunk", "k", "logn", "original_max_position_embeddings"))
    return argparse.Namespace(**{**vars(args), **given, **apart, **parameters})


def lengths_of(args: argparse.Namespace, window: int) -> list[int]:
    """The context lengths to measure; those of the default range that the cut context covers are left out.

    Raises:
        ConfigError: a length that was asked for, or all of the range, is within the cut context.
    """
    lengths = context_lengths(args)
    kept = [length for length in lengths if length > window]
    if (args.lengths is not None and kept != lengths) or not kept:
        asked = f"--lengths {lengths[0]}" if args.lengths is not None else f"--max-tokens {args.max_tokens}"
        raise ConfigError(f"{asked} is not allowed; above {window} tokens, the cut context (--key-window)")
    return kept


def key_tokens_of(args: argparse.Namespace, source: TokenSource, job: ModelJob) -> KeyTokens:
    """The key tokens of one data set, as the evaluator `job` chooses them; nothing is measured yet."""
    window = key_window(args, job)
    request = ControlRequest(window, args.key_stride)
    lengths = lengths_of(args, window)
    rule = KeyRule(args.key_gain, args.key_floor)
    return KeyTokens(job, losses_of(args, source, lengths), losses_of(args, source, lengths, request), rule)


def key_window(args: argparse.Namespace, job: ModelJob) -> int:
    """K, the cut context in tokens, of the evaluator `job`."""
    return int(args.key_window or min(WINDOW, job.scaling.original_max_position_embeddings or WINDOW))


def losses_of(
    args: argparse.Namespace, source: TokenSource, lengths: Sequence[int], control: ControlRequest | None = None
) -> Perplexity:
    """The evaluator of losses on a data set, with the whole context or with that of a control."""
    return Perplexity(
        source=source,
        lengths=lengths,
        parts=Parts(args.output),
        rows_per_pass=functools.partial(batch_size, args),
        windows=args.windows or 1,
        min_tokens=args.dataset_min_tokens or 0,
        samples=args.samples,
        prefill_chunk=args.prefill_chunk,
        save_nll=args.save_nll or f"{args.output}.nll",
        control=control,
    )


def measure(keys: Sequence[KeyTokens], args: argparse.Namespace) -> None:
    """Measure the evaluator's losses that are not there yet."""
    load, total = ModelLoader(args), sum(one.positions() for one in keys)
    quiet = args.hide_progress or not total
    with Progress(total=total, unit="tok", unit_scale=True, disable=quiet, desc=f"evaluator {keys[0].job.name}") as bar:
        for one in keys:
            one.measure(load, bar.update)


def print_keys(name: str, keys: KeyTokens, length: int) -> None:
    """Print how many tokens are key tokens, and the texts before some."""
    masks = keys.masks(length)
    found, judged = sum(int(mask.sum()) for mask in masks), len(masks) * (length - keys.control.window)
    on = f" on {name}" if name else ""
    print(f"\nkey tokens{on}: {found} of {judged} beyond {keys.control.window} tokens, chosen by {keys.job.name}")
    texts, _ = keys.whole.prepare(keys.job.model)
    for place, before, token in excerpts(strips(keys, length), texts, load_tokenizer(keys.job.model)):
        print(f"  {place}: {before}[{token}]")


def shown(row: Row) -> str:
    """A row's LongPPL with its interval."""
    if not row.get("key_tokens"):
        return "no key tokens"
    value, bounds = format_perplexity(row[METRIC]), row["interval"]
    return value if bounds is None else f"{value} ({' to '.join(map(format_perplexity, bounds))})"


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    sources = check_arguments(args)
    if args.figure is not None:
        check_format(Path(args.figure))
    several = len(sources) > 1
    own = evaluator_arguments(args)
    (judge,) = model_jobs(own)
    lengths = lengths_of(args, key_window(args, judge))
    keys = {source.name if several else "": key_tokens_of(args, source, judge) for source in sources}
    failures: list[Failure] = []
    jobs = model_jobs(args, failures)
    measure(list(keys.values()), own)
    evaluators = {
        name: LongPerplexity(inner=losses_of(args, source, lengths), keys=keys[name])
        for name, source in zip(keys, sources, strict=True)
    }
    found = run_all(evaluators, jobs, args, command_line(parser, argv), SEED, failures)
    code = report_failures(failures, jobs, evaluators, args.output, "longppl")
    longest = lengths[-1]
    for name, rows in found.items():
        print_keys(name, keys[name], longest)
        on = f" on {name}" if name else ""
        print_summary(f"LongPPL{on}, with 95 % intervals, by context length (tokens)", rows, shown)
    if args.figure is not None and current().is_first:
        save_gains(args.figure, [strip for one in keys.values() for strip in strips(one, longest)])
        print(f"\nfigure: {args.figure}")
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
