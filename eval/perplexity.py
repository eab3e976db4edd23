"""Perplexity against context length.

    python eval/perplexity.py -m MODEL --scaling yarn:8 --scaling default --dataset FOLDER --lengths 256,1024,4096

Protocol (`truncate`, the one behind the paper's tables 1, 2 and 6): a window of a document is cut at each length, with
the BOS prepended if the tokenizer has one. A context of L tokens, BOS included, has L-1 targets: every token but the
first. Perplexity is exp(sum of the targets' negative log-likelihoods / number of targets) over all windows, for the
first L tokens (`perplexity`) and for the tokens since the next shorter length (`perplexity_bucket`).

Where the scaling doesn't depend on the length, the pass over the longest window yields every shorter one, because a
causal model's prediction doesn't depend on what follows. Otherwise each length takes a pass of its own.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from scaled_rope.data import open_rows, read_documents
from scaled_rope.errors import ConfigError, Parser, run_cli
from scaled_rope.evaluation import (
    add_evaluation_arguments,
    batch_size,
    command_line,
    context_lengths,
    format_perplexity,
    print_summary,
    run,
)
from scaled_rope.loading import ModelJob, add_model_arguments, load_config, load_tokenizer, model_jobs
from scaled_rope.loss import IGNORE, token_nll
from scaled_rope.results import Row

Tokens = npt.NDArray[np.int64]


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/perplexity.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("text").add_argument
    add(
        "-d", "--dataset", metavar="PATH", help=".txt, .jsonl or .parquet file, folder of these, hub name or packed set"
    )
    add("--tokenized", metavar="PATH", help="the same for a tokenized set (column input_ids, no special tokens)")
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default="test", help="split of a hub dataset (default %(default)s)")
    add(
        "--dataset-min-tokens",
        type=int,
        metavar="N",
        help="documents must have N tokens (at least the longest context)",
    )
    add("--samples", type=int, metavar="N", help="the first N documents that are long enough (default: all)")
    add("--windows", type=int, default=1, metavar="N", help="windows per document, evenly spaced (default: its start)")
    add("--protocol", choices=("truncate", "sliding"), default=None, help="default truncate")
    add("--truncate", action="store_true", help="= --protocol truncate")
    add("--sliding-window", type=int, metavar="S", help="stride of the sliding protocol")
    add("--aggressive-memory", action="store_true", help=argparse.SUPPRESS)  # memory is always bounded
    add("-s", "--subset", help=argparse.SUPPRESS)
    add("--save-tokenized", help=argparse.SUPPRESS)
    add_evaluation_arguments(parser)
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be done before anything is read."""
    if args.protocol == "sliding" or (args.sliding_window is not None and not (args.truncate or args.protocol)):
        raise ConfigError("protocol 'sliding' is not available; use --truncate (one pass per window)")
    if args.subset is not None:
        raise ConfigError(f"subset {args.subset!r} is not available; give a local file or a dataset without subsets")
    if args.save_tokenized is not None:
        raise ConfigError("save-tokenized is not available; tokenization.py makes tokenized sets")
    if (args.dataset is None) == (args.tokenized is None):
        raise ConfigError("give either --dataset or --tokenized")
    for name in ("samples", "windows", "dataset_min_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"{name} {getattr(args, name)} is not allowed; at least 1")


def documents(args: argparse.Namespace, tokenizer: Any) -> Iterator[Tokens]:
    """Token ids of each document, without special tokens (packed sets: of each row, as it is)."""
    packed = args.tokenized or args.dataset
    if args.tokenized or any((Path(packed) / name).is_file() for name in ("meta.json", "dataset_info.json")):
        rows = open_rows(packed, args.split)
        for index in range(len(rows)):
            yield rows.row(index)[0]
    else:
        for text in read_documents(args.dataset, args.feature, args.split):
            # "verbose" off: a document longer than the model's context is what we came for.
            ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
            yield np.asarray(ids, dtype=np.int64)


def cut_windows(
    source: Iterator[Tokens], length: int, bos: int | None, windows: int, min_tokens: int, samples: int | None
) -> tuple[Tokens, int]:
    """Windows of exactly `length` tokens from the first `samples` documents that are long enough.

    A document counts if it has `min_tokens` tokens and fills one window. It gives up to `windows` windows that do not
    overlap, evenly spaced from its start to its end; with one window that is its start.

    Returns:
        int64 [N, length], each row beginning with `bos` where there is one, and the number of documents used.

    Raises:
        ConfigError: fewer documents than asked for are long enough, or none is.
    """
    cut: list[Tokens] = []
    used = read = 0
    for tokens in source:
        read += 1
        head = [] if bos is None else [bos]
        body = length - len(head)
        if len(tokens) and tokens[0] == bos:  # a packed row brings its own BOS; every window gets one
            tokens = tokens[1:]
        if len(tokens) < max(min_tokens, body):
            continue
        used += 1
        count = min(windows, len(tokens) // body)
        for start in np.linspace(0, len(tokens) - body, count).round().astype(int) if count > 1 else [0]:
            cut.append(np.concatenate([np.asarray(head, dtype=np.int64), tokens[start : start + body]]))
        if used == samples:
            break
    if not used or (samples is not None and used < samples):
        asked = "at least 1 is needed" if samples is None else f"--samples asks for {samples}"
        raise ConfigError(
            f"only {used} of {read} documents have {max(min_tokens, length)} tokens; {asked}: shorten the contexts"
        )
    return np.stack(cut), used


def ratio(total: float, count: int) -> float | None:
    """Perplexity from a sum in nats; None where it is not finite, since JSON has no such number."""
    if not count or not math.isfinite(total) or total / count > 700:
        return None
    return math.exp(total / count)


class Perplexity:
    """The evaluator; see the module's docstring for what it measures."""

    value = "perplexity"

    def __init__(self, args: argparse.Namespace) -> None:
        check_arguments(args)
        self.args = args
        self.lengths = context_lengths(args)
        self.starts = dict(zip(self.lengths, [0, *self.lengths], strict=False))
        self._prepare = functools.cache(self._windows_of)

    def _windows_of(self, model: str) -> tuple[Tokens, Row]:
        """The windows for a model's tokenizer, and what a row says about them."""
        args, longest = self.args, self.lengths[-1]
        tokenizer = load_tokenizer(model)
        bos = tokenizer.bos_token_id
        source = documents(args, tokenizer)
        tokens, used = cut_windows(source, longest, bos, args.windows, args.dataset_min_tokens or 0, args.samples)
        vocabulary = load_config(model).get_text_config().vocab_size
        if tokens.max() >= vocabulary:
            raise ConfigError(f"token id {tokens.max()} does not fit model {model!r} with a vocabulary of {vocabulary}")
        return tokens, {
            "name": Path(args.tokenized or args.dataset).name,
            "fingerprint": hashlib.sha256(tokens.tobytes()).hexdigest()[:16],
            "documents": used,
            "windows": len(tokens),
            "window_tokens": longest,
        }

    def cells(self, job: ModelJob) -> dict[int, Row]:
        _, data = self._prepare(job.model)
        return {
            length: {
                "metric": "perplexity",
                "data": data,
                "protocol": {"name": "truncate", "bucket_start": start},
            }
            for length, start in self.starts.items()
        }

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        if job.scaling.is_length_dependent:
            return {length: [length] for length in lengths}
        return {max(lengths): list(lengths)} if lengths else {}

    def tokens(self, job: ModelJob, length: int) -> int:
        return len(self._prepare(job.model)[0]) * length

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        windows = torch.from_numpy(self._prepare(job.model)[0][:, :length])
        # Column i holds the nats of token i+1 (counting from 0), summed over all windows.
        by_position = np.zeros(length - 1)
        with torch.inference_mode():
            for rows in torch.split(windows, batch_size(self.args, length)):
                rows = rows.to(model.device)
                targets = torch.full_like(rows, IGNORE)
                targets[:, :-1] = rows[:, 1:]
                nll = token_nll(model, rows, targets)[:, :-1]
                by_position += nll.cpu().numpy().astype(np.float64).sum(axis=0)
                advance(rows.numel())
        for wanted in yields:
            # Token i sits in the first L tokens if i < L, so L tokens have L-1 targets.
            start = self.starts[wanted]
            whole, bucket = by_position[: wanted - 1], by_position[max(start - 1, 0) : wanted - 1]
            yield (
                wanted,
                {
                    "perplexity": ratio(whole.sum(), whole.size * len(windows)),
                    "targets": whole.size * len(windows),
                    "bucket": [start, wanted],
                    "perplexity_bucket": ratio(bucket.sum(), bucket.size * len(windows)),
                    "bucket_targets": bucket.size * len(windows),
                },
            )


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    evaluator = Perplexity(args)
    jobs = model_jobs(args)
    rows = run(evaluator, jobs, args, command_line(parser, argv))
    print_summary("perplexity of the first tokens", rows, lambda row: format_perplexity(row["perplexity"]))
    title = "perplexity of the position bucket that ends at"
    print_summary(title, rows, lambda row: format_perplexity(row["perplexity_bucket"]))
    print(f"\nrows: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
