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

Weighting `token`: perplexity is exp(sum of the targets' negative log-likelihoods / number of targets), over all
windows. `window`, the released code's: exp of the unweighted mean over windows of each window's mean.

Data sets are .txt, .jsonl or .parquet files, folders of these, hub names, packed sets, or standin:NAME for texts from
package archives (python -m scaled_rope.texts.corpora list).
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from scaled_rope.checkpoint import encode
from scaled_rope.command_line import Parser, refuse_early, run_cli
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.windows import (
    SEED,
    WEIGHTINGS,
    Document,
    Losses,
    LossFolder,
    Nats,
    Texts,
    Tokens,
    Window,
    batches,
    bootstrap,
    cumulate,
    perplexity,
    select,
    sliding,
    terms,
    truncated,
)
from scaled_rope.flags import (
    add_evaluation_arguments,
    add_model_arguments,
    batch_size,
    check_model_arguments,
    context_lengths,
)
from scaled_rope.results import Row, row_key
from scaled_rope.texts.corpora import STANDIN
from scaled_rope.texts.documents import hub_documents, hub_table, read_documents
from scaled_rope.texts.packed import ColumnDataset, TokenRows, open_rows

DOCUMENTS_IN_ROW = 200
"""A row lists the sums of its documents when there are no more than these."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser("eval/perplexity.py", __doc__ or "")
    add_model_arguments(parser)
    add = parser.add_argument_group("text").add_argument
    add("-d", "--dataset", action="append", metavar="NAME", help="texts, or a packed set (see above); repeatable")
    add("--tokenized", action="append", metavar="NAME", help="a tokenized set (column input_ids); repeatable")
    add("-s", "--subset", metavar="NAME", help="configuration of a hub dataset")
    add("-f", "--feature", default="text", help="field that holds the text (default %(default)s)")
    add("--split", default="test", help="split of a hub dataset (default %(default)s)")
    add("--dataset-min-tokens", type=int, metavar="N", help="documents must have N tokens")
    add("--samples", type=int, metavar="N", help="the first N documents that are long enough (default: all)")
    add("--save-tokenized", metavar="DIR", help="tokenize the dataset into DIR, for --tokenized, and exit")
    add = parser.add_argument_group("what is measured").add_argument
    add("--protocol", choices=("truncate", "sliding"), help="see above (default: truncate)")
    add("--stride", type=int, metavar="S", help="distance between sliding windows in tokens (default: 256)")
    add("--weighting", choices=WEIGHTINGS, default="token", help="see above (default: %(default)s)")
    add("--windows", type=int, metavar="N", help="truncate N windows per document, evenly spaced (default: its start)")
    add("--truncate", action="store_true", help="= --protocol truncate, whatever else is said")
    add("--sliding-window", type=int, metavar="S", help="= --protocol sliding --stride S")
    add("--prefill-chunk", type=int, metavar="N", help="positions that go through the model at once (default: all)")
    add("--save-nll", metavar="DIR", help="keep every token's loss; what is there needs no pass any more")
    add("--aggressive-memory", action="store_true", help=argparse.SUPPRESS)  # memory is always bounded
    add_evaluation_arguments(parser)
    return parser


@dataclass(frozen=True)
class Source:
    """A data set as given on the command line."""

    name: str
    tokenized: bool = False

    @property
    def title(self) -> str:
        return Path(self.name).name


def check_arguments(args: argparse.Namespace) -> tuple[list[Source], int | None]:
    """The data sets, and the stride of the sliding protocol or None; refuses what cannot be done."""
    check_model_arguments(args)
    lengths = context_lengths(args)
    if bool(args.dataset) == bool(args.tokenized):
        raise ConfigError("give either --dataset or --tokenized")
    for name in ("samples", "windows", "dataset_min_tokens", "stride", "sliding_window", "prefill_chunk"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)} is not allowed; at least 1")
    if args.save_nll is not None and Path(args.save_nll).is_file():
        raise ConfigError(f"--save-nll {args.save_nll} is a file; name a folder")
    sources = [Source(name, bool(args.tokenized)) for name in dict.fromkeys(args.dataset or args.tokenized)]
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
import torch

from scaled_rope.checkpoint import display_name, load_config, load_tokenizer
from scaled_rope.evaluation.formatting import format_perplexity
from scaled_rope.evaluation.jobs import ModelJob, model_jobs
from scaled_rope.evaluation.memory_meter import Meter, is_out_of_memory, release_memory
from scaled_rope.evaluation.runner import Failure, Parts, command_line, print_summary, report_failures, run_all
from scaled_rope.patching.loss import IGNORE, token_nll
from scaled_rope.scaling.frequencies import at_length


def is_length_dependent(job: ModelJob) -> bool:
    """Whether what a job's model computes for a token depends on what follows it."""
    return any(scaling.is_length_dependent for scaling in (job.scaling, *job.plan.layers.values()))


# ------------------------------------------------------------------------------------------------------------- text


def documents(args: argparse.Namespace, source: Source, tokenizer: Any) -> Iterator[Tokens]:
    """Token ids of each document, without special tokens (packed sets: of each row, as it is)."""
    name = source.name
    if args.subset is not None and (Path(name).exists() or name.startswith(STANDIN)):
        raise ConfigError(f"subset {args.subset!r} is for hub datasets; {name!r} is none")
    if source.tokenized or any((Path(name) / file).is_file() for file in ("meta.json", "dataset_info.json")):
        rows: TokenRows = (
            open_rows(name, args.split)
            if args.subset is None
            else ColumnDataset(hub_table(name, args.subset, args.split), name)
        )
        for index in range(len(rows)):
            yield rows.row(index)[0]
        return
    if args.subset is not None:
        texts = hub_documents(name, args.subset, args.split, args.feature)
    else:
        texts = read_documents(name, args.feature, args.split)
    for text in texts:
        yield np.asarray(encode(tokenizer, text), dtype=np.int64)


def save_tokenized(args: argparse.Namespace, source: Source, models: Sequence[str], output: str) -> int:
    """Write all of a data set's documents as token ids; gives their number.

    Raises:
        ConfigError: something there already, or several tokenizers to choose from.
    """
    if len(models) != 1:
        raise ConfigError(f"save-tokenized takes one model, for its tokenizer, not {len(models)}")
    path = Path(output)
    if path.exists():
        raise ConfigError(f"output {output} exists; remove it or choose another folder")
    try:
        import datasets
    except ImportError:
        raise ConfigError("save-tokenized needs: pip install 'scaled-rope[train]'") from None
    found = [tokens.astype(np.int32) for tokens in documents(args, source, load_tokenizer(models[0]))]
    if not found:
        raise ConfigError(f"dataset {source.name!r} is empty")
    columns = {
        "input_ids": (found, datasets.Sequence(datasets.Value("int32"))),
        "attention_mask": ([np.ones(len(one), np.int8) for one in found], datasets.Sequence(datasets.Value("int8"))),
        "tokenized_len": ([len(one) for one in found], datasets.Value("int64")),
    }
    table = datasets.Dataset.from_dict(
        {name: values for name, (values, _) in columns.items()},
        features=datasets.Features({name: kind for name, (_, kind) in columns.items()}),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.partial")
    silent = not datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        table.save_to_disk(str(staged))
        os.rename(staged, path)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        if not silent:
            datasets.enable_progress_bars()
    return len(found)


# -------------------------------------------------------------------------------------------------------- evaluator

Sums = dict[str, list[float | None]]
"""For each context length, as text, the nats of each window of a document; None where they are not finite."""


@dataclass
class Done:
    """What is known of a pass, by document, and what it cost."""

    sums: dict[int, Sums] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: int = 0
    peak_memory: int = 0

    def add(self, other: Done) -> None:
        self.sums |= other.sums
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.peak_memory = max(self.peak_memory, other.peak_memory)

    def cost(self) -> Row:
        return {"seconds": self.seconds, "tokens": self.tokens, "peak_memory": self.peak_memory}


class Perplexity:
    """The evaluator of one data set; see the module's docstring for what it measures."""

    value = "perplexity"

    def __init__(self, args: argparse.Namespace, source: Source | None = None) -> None:
        sources, self.stride = check_arguments(args)
        self.args = args
        self.source = source or sources[0]
        self.lengths = context_lengths(args)
        self.starts = dict(zip(self.lengths, [0, *self.lengths], strict=False))
        self.parts = Parts(args.output)
        self.prepare = functools.cache(self._prepare)
        self._found: dict[tuple[ModelJob, int], Done] = {}

    def _prepare(self, model: str) -> tuple[Texts, Row]:
        """The documents for a model's tokenizer, and what a row says about them."""
        args, longest = self.args, self.lengths[-1]
        tokenizer = load_tokenizer(model)
        source = documents(args, self.source, tokenizer)
        fill = longest if self.stride is None else None
        enough = (args.windows or 1, args.dataset_min_tokens or 0, args.samples)
        try:
            texts = select(source, tokenizer.bos_token_id, fill, *enough)
        except ConfigError as error:  # about the file that was being read, or about all of them
            named = self.source.name in str(error)
            raise error if named else ConfigError(f"dataset {self.source.name!r}: {error}") from None
        vocabulary = load_config(model).get_text_config().vocab_size
        largest = max(texts.bos or 0, *(int(document.tokens.max()) for document in texts.documents))
        if largest >= vocabulary:
            raise ConfigError(f"token id {largest} does not fit model {model!r} with a vocabulary of {vocabulary}")
        digest, said = hashlib.sha256(), {"name": self.source.title, "documents": len(texts.documents)}
        if args.subset is not None:
            said["subset"] = args.subset
        if self.stride is None:
            windows = truncated(texts, longest)
            for window in windows:
                digest.update(texts.ids(window).tobytes())
            said |= {"windows": len(windows), "window_tokens": longest}
        else:
            for document in texts.documents:
                digest.update(document.digest.encode())
            said |= {"tokens": sum(len(document.tokens) for document in texts.documents)}
        return texts, {**said, "fingerprint": digest.hexdigest()[:16]}

    def cells(self, job: ModelJob) -> dict[int, Row]:
        _, data = self.prepare(job.model)
        more = {} if self.args.weighting == "token" else {"weighting": self.args.weighting}
        cells: dict[int, Row] = {}
        for length, start in self.starts.items():
            cells[length] = {"metric": "perplexity", "data": data}
            if self.stride is not None:
                cells[length]["protocol"] = {"name": "sliding", "stride": self.stride, **more}
            else:
                cells[length]["protocol"] = {"name": "truncate", "bucket_start": start, **more}
                # Here, so that a row without a result has them too.
                cells[length] |= {"bucket": [start, length], "perplexity_bucket": None}
        return cells

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        if self.stride is not None:
            return {length: [length] for length in lengths}
        # Lengths at which a length-dependent scaling is the same (up to the original one, for most) share a pass too.
        alike: dict[str, list[int]] = {}
        for length in lengths:
            meanings = [at_length(one, length) for one in (job.scaling, *job.plan.layers.values())]
            alike.setdefault(repr(meanings), []).append(length)
        return {max(group): group for group in alike.values()}

    def tokens(self, job: ModelJob, length: int) -> int:
        texts = self.prepare(job.model)[0]
        return sum(texts.positions(window) for window in self._windows(texts, length))

    def needs_model(self, job: ModelJob, length: int, yields: Sequence[int]) -> bool:
        self._found[job, length] = found = self._known(job, length, yields)
        return len(found.sums) < len(self.prepare(job.model)[0].documents)

    def _windows(self, texts: Texts, length: int) -> list[Window]:
        return truncated(texts, length) if self.stride is None else sliding(texts, length, self.stride)

    # What is known already: losses in files, or sums of documents from a run that was interrupted.

    def _context(self, job: ModelJob, length: int) -> str:
        """What a token's loss depends on beside the tokens before it."""
        if self.stride is not None:
            return f"sliding {length} {self.stride}"
        return f"at {length}" if is_length_dependent(job) else "all"

    def _folder(self, job: ModelJob) -> LossFolder | None:
        if self.args.save_nll is None:
            return None
        key = row_key({field: job.fields()[field] for field in ("model_fingerprint", "dtype", "scaling")})
        name = f"{display_name(job.model)} {job.label}".replace("/", "_").replace(" ", "_")
        return LossFolder(self.args.save_nll, f"{name}-{key[:8]}")

    def _key(self, job: ModelJob, length: int) -> str:
        """Identifies a pass among the partial results."""
        data = self.prepare(job.model)[1]
        return row_key({**job.fields(), "metric": "nats", "data": data, "protocol": self._context(job, length)})

    def _sums(self, losses: list[Losses], length: int) -> Sums:
        """Sums of a document's windows, given the losses of each."""
        if self.stride is not None:
            return {str(length): [_finite(cumulate(one, [len(one)])[0]) for one in losses]}
        lengths = [one for one in self.lengths if one <= length]
        columns = [cumulate(one, [wanted - 1 for wanted in lengths]) for one in losses]
        return {str(wanted): [_finite(column[index]) for column in columns] for index, wanted in enumerate(lengths)}

    def _known(self, job: ModelJob, length: int, yields: Sequence[int]) -> Done:
        texts = self.prepare(job.model)[0]
        found = Done()
        if folder := self._folder(job):
            for index, windows in _by_document(self._windows(texts, length)).items():
                losses = self._stored(folder, texts.documents[index], windows, self._context(job, length))
                if losses is not None:
                    found.sums[index] = self._sums(losses, length)
            return found  # what is not in the folder has to be put there
        needed = {str(one) for wanted in yields for one in (wanted, self.starts[wanted]) if one}
        if self.stride is not None:
            needed = {str(length)}
        for line in self.parts.read(self._key(job, length)):
            for index, sums in line["parts"].items():
                if needed <= set(sums):
                    found.sums[int(index)] = sums
            found.add(Done({}, line["seconds"], line["tokens"], line["peak_memory"]))
        return found

    def _stored(
        self, folder: LossFolder, document: Document, windows: list[Window], context: str
    ) -> list[Losses] | None:
        if self.stride is None:
            read = [folder.read(document, window.begin, context, window.scored) for window in windows]
            return None if any(one is None for one in read) else [one for one in read if one is not None]
        whole = folder.read(document, 0, context, sum(window.scored for window in windows))
        return None if whole is None else np.split(whole, np.cumsum([window.scored for window in windows])[:-1])

    def _store(
        self, folder: LossFolder, texts: Texts, windows: list[Window], losses: list[Losses], context: str
    ) -> None:
        document = texts.documents[windows[0].document]
        if self.stride is not None:
            folder.write(document, 0, context, np.concatenate(losses), texts.head)
            return
        for window, one in zip(windows, losses, strict=True):
            folder.write(document, window.begin, context, one, texts.head)

    # The passes.

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        texts = self.prepare(job.model)[0]
        done = self._found.pop((job, length), None) or self._known(job, length, yields)
        key, folder, context = self._key(job, length), self._folder(job), self._context(job, length)
        windows = self._windows(texts, length)
        by_document = _by_document(windows)
        pending = {index: of for index, of in by_document.items() if index not in done.sums}
        losses: dict[int, list[Losses]] = {index: [] for index in pending}
        limit, unsaved = batch_size(self.args, length), Done()
        for batch in batches(windows, lambda window: batch_size(self.args, texts.positions(window))):
            count = sum(texts.positions(window) for window in batch)
            wanted = [window.document in losses for window in batch]
            if any(wanted):
                with Meter(model.device) as meter:
                    limit, scored = self._score(model, texts, batch, limit)
                finished: dict[int, Sums] = {}
                for window, keep, one in zip(batch, wanted, scored, strict=True):
                    if not keep:
                        continue
                    index = window.document
                    losses[index].append(one)
                    if len(losses[index]) == len(pending[index]):
                        of = losses.pop(index)
                        if folder:
                            self._store(folder, texts, pending[index], of, context)
                        finished[index] = self._sums(of, length)
                unsaved.add(Done(finished, meter.seconds, count, meter.peak_memory))
                if finished:
                    done.add(unsaved)
                    if losses and not folder:  # with no document left the rows follow at once
                        self.parts.add(key, finished, **unsaved.cost())
                    unsaved = Done()
            advance(count)
        for wanted_length in yields:
            yield wanted_length, {**self._row(done, by_document, wanted_length), **_cost(done, length)}
        self.parts.discard(key)

    def _score(self, model: Any, texts: Texts, batch: list[Window], limit: int) -> tuple[int, list[Losses]]:
        """The losses of each window's scored tokens, `limit` windows at a time, or fewer if memory demands it.

        Returns the number of windows that fitted, and the losses.
        """
        rows = torch.from_numpy(np.stack([texts.ids(window) for window in batch]))
        start = rows.shape[1] - 1 - batch[0].scored
        scored: list[Losses] = []
        while len(scored) < len(batch):
            part = rows[len(scored) : len(scored) + limit].to(model.device)
            targets = torch.full_like(part, IGNORE)
            targets[:, :-1] = part[:, 1:]
            try:
                with torch.inference_mode():
                    nll = token_nll(model, part, targets, start=start, prefill_chunk=self.args.prefill_chunk)
                    scored += list(nll[:, :-1].float().cpu().numpy())
                continue
            except Exception as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
            limit = len(part) // 2
            release_memory()
        return limit, scored

    def _row(self, done: Done, windows: dict[int, list[Window]], length: int) -> Row:
        nats = [_numbers(done.sums[index][str(length)]) for index in windows]
        weighting = self.args.weighting
        if self.stride is not None:
            targets = [np.array([window.scored for window in of], dtype=float) for of in windows.values()]
        else:
            targets = [np.full(len(one), length - 1.0) for one in nats]
        above, below = terms(nats, targets, weighting)
        row: Row = {
            "perplexity": perplexity(above.sum(), below.sum()),
            "interval": bootstrap(above, below),
            "targets": int(sum(one.sum() for one in targets)),
        }
        if self.stride is None:
            start = self.starts[length]
            if start:
                nats_before = [_numbers(done.sums[index][str(start)]) for index in windows]
                nats_bucket = [one - before for one, before in zip(nats, nats_before, strict=True)]
            else:
                nats_bucket = nats
            targets_bucket = [np.full(len(one), float(length - max(start, 1))) for one in nats]
            above, below = terms(nats_bucket, targets_bucket, weighting)
            row |= {
                "bucket": [start, length],
                "perplexity_bucket": perplexity(above.sum(), below.sum()),
                "interval_bucket": bootstrap(above, below),
                "bucket_targets": int(sum(one.sum() for one in targets_bucket)),
            }
        else:
            row["windows"] = sum(len(one) for one in targets)
        if len(nats) <= DOCUMENTS_IN_ROW:
            row["document_nats"] = [_finite(float(one.sum())) for one in nats]
            row["document_targets"] = [int(one.sum()) for one in targets]
        return row


def _by_document(windows: Sequence[Window]) -> dict[int, list[Window]]:
    found: dict[int, list[Window]] = {index: [] for index in Counter(window.document for window in windows)}
    for window in windows:
        found[window.document].append(window)
    return found


def _finite(nats: float) -> float | None:
    return nats if np.isfinite(nats) else None


def _numbers(sums: Sequence[float | None]) -> Nats:
    return np.array([np.nan if one is None else one for one in sums], dtype=np.float64)


def _cost(done: Done, length: int) -> Row:
    """What the whole pass took; a pass may yield several rows. Nothing where all losses were there already."""
    return {
        "pass_length": length,
        "seconds": round(done.seconds, 3),
        "tokens_per_second": round(done.tokens / done.seconds, 1) if done.seconds else None,
        "peak_memory": done.peak_memory or None,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    sources, stride = check_arguments(args)
    jobs = model_jobs(args)
    if args.save_tokenized is not None:
        if len(sources) != 1 or sources[0].tokenized:
            raise ConfigError("save-tokenized takes one --dataset")
        models = list(dict.fromkeys(job.model for job in jobs))
        count = save_tokenized(args, sources[0], models, args.save_tokenized)
        print(f"{count} documents: {args.save_tokenized}")
        return 0
    several = len(sources) > 1
    evaluators = {source.title if several else "": Perplexity(args, source) for source in sources}
    if len(evaluators) < len(sources):
        evaluators = {source.name: Perplexity(args, source) for source in sources}
    failures: list[Failure] = []
    found = run_all(evaluators, jobs, args, command_line(parser, argv), SEED, failures)
    code = report_failures(failures, jobs)
    for name, rows in found.items():
        what = "perplexity of the first tokens" if stride is None else f"perplexity in sliding windows, stride {stride}"
        on = f", {name}" if name else ""
        print_summary(what + on, rows, lambda row: format_perplexity(row["perplexity"]))
        if stride is None:
            title = "perplexity of the position bucket that ends at"
            print_summary(title + on, rows, lambda row: format_perplexity(row["perplexity_bucket"]))
    print(f"\nrows: {args.output}")
    return code


if __name__ == "__main__":
    sys.exit(run_cli(main))
