"""Perplexity against context length.

    python eval/perplexity.py -m MODEL --scaling yarn:8 --scaling default --dataset FOLDER --lengths 256,1024,4096

Protocol `truncate` (the one behind the paper's tables 1, 2 and 6): a window of a document is cut at each length, with
the BOS prepended if the tokenizer has one. A context of L tokens, BOS included, has L-1 targets: every token but the
first. Where the scaling doesn't depend on the length, the pass over the longest window yields every shorter one,
because a causal model's prediction doesn't depend on what follows. Otherwise each length takes a pass of its own, but
for those at which the scaling is the same.
Reported are the first L tokens (`perplexity`) and the tokens since the next shorter length (`perplexity_bucket`).

Protocol `sliding` (table 4): windows of L positions begin every S tokens of a document, up to the one that reaches its
end, and each scores only the tokens that no earlier one did.

The control (`--control`) asks whether what stands further back helps: each token beyond the base's trained length L is
predicted again from the last L tokens only, by the same weights, in windows of L positions that begin every S tokens,
so that every scored token has between L-S and L-1 positions before it. Its rows cost about L/S times the tokens, in
passes of L, and are compared with the others by document. An unscaled base's control says what cutting the text would
have done. Under the sliding protocol it scores all tokens, those that begin a document as well, for which the two are
the same.

Weighting `token`: perplexity is exp(sum of the targets' negative log-likelihoods / number of targets), over all
windows. `window`, the released code's: exp of the unweighted mean over windows of each window's mean.

Data sets are .txt, .jsonl or .parquet files, folders of these, hub names, packed sets, or standin:NAME for texts from
package archives (python -m scaled_rope.texts.corpora list).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping, Sequence

from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import ControlRequest
from scaled_rope.evaluation.statistics import SEED
from scaled_rope.evaluation.windows import WEIGHTINGS
from scaled_rope.flags.evaluators import (
    add_evaluation_arguments,
    add_model_arguments,
    add_server_arguments,
    add_text_arguments,
    batch_size,
    check_losses_folder,
    check_model_arguments,
    check_server_arguments,
    check_text_arguments,
    context_lengths,
)
from scaled_rope.flags.shared import check_least
from scaled_rope.texts.token_documents import TokenSource, save_token_documents


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/perplexity.py", __doc__ or "")
    add_model_arguments(parser)
    add_server_arguments(parser)
    add_text_arguments(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--save-tokenized", metavar="DIR", help="tokenize the dataset into DIR, for --tokenized, and exit")
    add("--protocol", choices=("truncate", "sliding"), help="see above (default: truncate)")
    add("--stride", type=int, metavar="S", help="distance between sliding windows in tokens (default: 256)")
    add("--weighting", choices=WEIGHTINGS, default="token", help="see above (default: %(default)s)")
    add("--truncate", action="store_true", help="= --protocol truncate, whatever else is said")
    add("--sliding-window", type=int, metavar="S", help="= --protocol sliding --stride S")
    add(
        "--control",
        nargs="?",
        const="trained",
        metavar="WHAT",
        help="measure the control too, see above: window=W for another L, stride=S (default L/4), both with a comma "
        "between, or off (default: off)",
    )
    add("--save-nll", metavar="DIR", help="keep every token's loss; what is there needs no pass any more")
    add("--aggressive-memory", action="store_true", help=argparse.SUPPRESS)  # memory is always bounded
    add_evaluation_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> tuple[list[TokenSource], int | None]:
    """Check the flags and return the data sets, and the stride of the sliding protocol or None."""
    check_model_arguments(args)
    check_server_arguments(args)
    lengths = context_lengths(args)
    check_text_arguments(args)
    check_least(args, stride=1, sliding_window=1)
    ControlRequest.parse(args.control)
    check_losses_folder(args.save_nll)
    sources = [
        TokenSource(name, bool(args.tokenized), args.feature, args.split, args.subset)
        for name in dict.fromkeys(args.dataset or args.tokenized)
    ]
    implied = "truncate" if args.sliding_window is None else "sliding"
    if args.truncate or (args.protocol or implied) == "truncate":
        if args.stride is not None:
            raise ConfigError(f"--stride {args.stride} is for --protocol sliding")
        return sources, None
    if args.windows is not None:
        raise ConfigError(f"--windows {args.windows} is for --protocol truncate; sliding windows cover whole documents")
    if None not in (args.stride, args.sliding_window) and args.stride != args.sliding_window:
        raise ConfigError(f"--sliding-window {args.sliding_window} is a stride, and --stride says {args.stride}")
    stride = args.stride or args.sliding_window or 256
    if stride > lengths[0]:
        flag = "sliding-window" if args.stride is None and args.sliding_window is not None else "stride"
        said = f"--{flag} {stride}" + ("" if args.stride or args.sliding_window else ", the default,")
        raise ConfigError(f"{said} is not allowed; at most {lengths[0]}, the shortest window in tokens")
    return sources, stride


if __name__ == "__main__":
    refuse_early(lambda: check_arguments(build_parser().parse_args()))

# What takes seconds to import stands below the flags.
from scaled_rope.checkpoint import load_tokenizer
from scaled_rope.evaluation.controls import compare, counted, uses_context
from scaled_rope.evaluation.failures import Failure, report_failures
from scaled_rope.evaluation.formatting import format_perplexity
from scaled_rope.evaluation.jobs import ModelJob, model_jobs
from scaled_rope.evaluation.perplexity_evaluator import Perplexity
from scaled_rope.evaluation.ranks import current, on_ranks
from scaled_rope.evaluation.runner import Parts, command_line, print_output, print_summary, run_all
from scaled_rope.results import Row

CONTROL_NAME = "last tokens only"


def evaluator_of(args: argparse.Namespace, source: TokenSource | None = None, control: bool = False) -> Perplexity:
    """Make the evaluator that the flags ask for, for one of their data sets; by default the first.

    control: make that of its control.
    """
    sources, stride = check_arguments(args)
    return Perplexity(
        source=source or sources[0],
        lengths=context_lengths(args),
        parts=Parts(args.output),
        rows_per_pass=functools.partial(batch_size, args),
        stride=stride,
        weighting=args.weighting,
        windows=args.windows or 1,
        min_tokens=args.dataset_min_tokens or 0,
        samples=args.samples,
        prefill_chunk=args.prefill_chunk,
        save_nll=args.save_nll,
        control=ControlRequest.parse(args.control) if control else None,
    )


def save_tokenized(source: TokenSource, models: Sequence[str], output: str) -> int:
    """Write all of a data set's documents as token ids; return their number.

    Raises:
        ConfigError: `output` exists already, or there are several tokenizers to choose from.
    """
    if len(models) != 1:
        raise ConfigError(f"save-tokenized takes one model, for its tokenizer, not {len(models)}")
    return save_token_documents(source.documents(load_tokenizer(models[0])), output, source.name)


def print_controls(
    on: str,
    rows: Mapping[ModelJob, Mapping[int, Row]],
    controls: Mapping[ModelJob, Mapping[int, Row]],
    evaluator: Perplexity,
) -> None:
    """Print, for each job, whether it uses what its control does not see."""
    sliding = evaluator.stride is not None
    what = "perplexity in windows of" if sliding else "perplexity of the position bucket that ends at"
    field = "perplexity" if sliding else "perplexity_bucket"
    print_summary(f"{what}, after the last tokens only{on}", controls, lambda row: format_perplexity(row[field]))
    print(f"\nagainst the same weights reading the last tokens only{on}")
    for job, cells in controls.items():
        control = evaluator.control_of(job)
        assert control is not None  # an evaluator of controls
        if not evaluator.cells(job):
            print(f"{job.name}: no length is beyond its {control.window} tokens")
            continue
        measured = rows.get(job, {})
        ends = counted(list(cells), control.window, job.made_for)
        if sliding:
            ends = ends[-1:]  # each length scores all tokens
        change = compare([(measured[length], cells[length]) for length in ends if length in measured])
        print(f"{job.name}: {uses_context(change, control.window)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    sources, stride = check_arguments(args)
    failures: list[Failure] = []
    jobs = model_jobs(args, failures if args.save_tokenized is None else None)
    if args.save_tokenized is not None:
        if len(sources) != 1 or sources[0].tokenized:
            raise ConfigError("save-tokenized takes one --dataset")
        models = list(dict.fromkeys(job.model for job in jobs))
        count = current().first(lambda: save_tokenized(sources[0], models, args.save_tokenized))
        print(f"{count} documents: {args.save_tokenized}")
        return 0
    several = len(sources) > 1
    evaluators = {source.title if several else "": evaluator_of(args, source) for source in sources}
    if len(evaluators) < len(sources):
        evaluators = {source.name: evaluator_of(args, source) for source in sources}
    controls: dict[str, str] = {}
    if ControlRequest.parse(args.control) is not None:
        controls = {name: f"{name}, {CONTROL_NAME}" if name else CONTROL_NAME for name in evaluators}
        by_name = dict(zip(evaluators, sources, strict=True))
        evaluators = {
            title: evaluator_of(args, by_name[name], title != name)
            for name in by_name
            for title in (name, controls[name])
        }
    found = run_all(evaluators, jobs, args, command_line(parser, argv), SEED, failures)
    code = report_failures(failures, jobs, evaluators, args.output, "perplexity")
    for name, rows in found.items():
        if name in controls.values():
            continue
        what = "perplexity of the first tokens" if stride is None else f"perplexity in sliding windows, stride {stride}"
        on = f", {name}" if name else ""
        print_summary(what + on, rows, lambda row: format_perplexity(row["perplexity"]))
        if stride is None:
            title = "perplexity of the position bucket that ends at"
            print_summary(title + on, rows, lambda row: format_perplexity(row["perplexity_bucket"]))
    for name, title in controls.items():
        print_controls(f" on {name}" if name else "", found[name], found[title], evaluators[title])
    print_output(args.output)
    return code


if __name__ == "__main__":
    sys.exit(run_cli(lambda: on_ranks(main)))
