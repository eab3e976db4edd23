"""The evaluator of perplexity: documents are cut into windows, scored, and summed up by context length."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from scaled_rope.checkpoint import display_name, load_config, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.controls import CONTROL, Control, ControlRequest
from scaled_rope.evaluation.jobs import ModelJob
from scaled_rope.evaluation.memory_meter import Meter, is_out_of_memory, release_memory
from scaled_rope.evaluation.perplexity_rows import PassResult, Sums, cost_fields, sliding_row, truncated_row
from scaled_rope.evaluation.ranks import current
from scaled_rope.evaluation.runner import Parts
from scaled_rope.evaluation.scored_passes import ScoredPass, windows_of
from scaled_rope.evaluation.served_model import ServedModel
from scaled_rope.evaluation.windows import (
    Losses,
    LossFolder,
    Texts,
    Window,
    batches,
    select,
    tell_copies,
    truncated,
    windows_fingerprint,
)
from scaled_rope.patching.device_maps import computing_devices, input_device
from scaled_rope.patching.loss import IGNORE, token_nll
from scaled_rope.results import Row, row_key
from scaled_rope.scaling.frequencies import at_length
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.texts.token_documents import TokenSource


def is_length_dependent(job: ModelJob) -> bool:
    """Whether what a job's model computes for a token depends on later tokens: its scale follows the length."""
    return any(scaling.is_length_dependent for scaling in (job.scaling, *job.plan.layers.values()))


@dataclass(eq=False, kw_only=True)
class Perplexity:
    """The evaluator of one data set.

    Attributes:
        source: the documents.
        lengths: context lengths in tokens, ascending.
        parts: keeps sums of documents until their pass has ended.
        rows_per_pass: windows per forward pass, given their length.
        stride: stride of sliding windows, in tokens; None: windows are truncated.
        weighting: as for `terms`.
        windows: number of truncated windows per document.
        min_tokens: least number of tokens of a document.
        samples: the first so many documents that are long enough; None: all.
        prefill_chunk: positions that go through the model at once; None: all.
        save_nll: folder for every token's loss.
        control: measure the control instead: the same tokens, each read after the last few only.
    """

    source: TokenSource
    lengths: Sequence[int]
    parts: Parts
    rows_per_pass: Callable[[int], int]
    stride: int | None = None
    weighting: str = "token"
    windows: int = 1
    min_tokens: int = 0
    samples: int | None = None
    prefill_chunk: int | None = None
    save_nll: str | None = None
    control: ControlRequest | None = None
    _prepared: dict[str, tuple[Texts, Row]] = field(default_factory=dict, init=False, repr=False)
    _found: dict[tuple[ModelJob, int], PassResult] = field(default_factory=dict, init=False, repr=False)

    value = "perplexity"

    # The documents.

    def prepare(self, model: str) -> tuple[Texts, Row]:
        """The documents for a model's tokenizer, and a row's description of them.

        Raises:
            ConfigError: they cannot be read, too few are long enough, or their tokens do not fit the model.
        """
        if model not in self._prepared:
            texts = self._select(load_tokenizer(model))
            vocabulary = text_config(load_config(model)).vocab_size
            largest = max(texts.bos or 0, *(int(document.tokens.max()) for document in texts.documents))
            if largest >= vocabulary:
                raise ConfigError(f"token id {largest} does not fit model {model!r} with a vocabulary of {vocabulary}")
            if current().is_first:
                tell_copies(self.source.name, texts.copies)
            self._prepared[model] = texts, self._describe(texts)
        return self._prepared[model]

    def _select(self, tokenizer: Any) -> Texts:
        """The documents that are scored."""
        fill = self.lengths[-1] if self.stride is None else None
        enough = (self.windows, self.min_tokens, self.samples)
        try:
            return select(self.source.documents(tokenizer), tokenizer.bos_token_id, fill, *enough)
        except ConfigError as error:  # about the file that was being read, or about all of them
            named = self.source.name in str(error)
            raise error if named else ConfigError(f"dataset {self.source.name!r}: {error}") from None

    def _describe(self, texts: Texts) -> Row:
        """A row's description of the documents."""
        said: Row = {"name": self.source.title, "documents": len(texts.documents)}
        if self.source.subset is not None:
            said["subset"] = self.source.subset
        if self.stride is None:
            longest = self.lengths[-1]
            said |= {"windows": len(truncated(texts, longest)), "window_tokens": longest}
            return {**said, "fingerprint": windows_fingerprint(texts, longest)}
        digest = hashlib.sha256("".join(document.digest for document in texts.documents).encode())
        said |= {"tokens": sum(len(document.tokens) for document in texts.documents)}
        return {**said, "fingerprint": digest.hexdigest()[:16]}

    # What there is to measure.

    @property
    def _starts(self) -> dict[int, int]:
        """Context length -> the position at which its bucket begins."""
        return dict(zip(self.lengths, [0, *self.lengths], strict=False))

    def cells(self, job: ModelJob) -> dict[int, Row]:
        _, data = self.prepare(job.model)
        more = {} if self.weighting == "token" else {"weighting": self.weighting}
        cells: dict[int, Row] = {}
        control = self.control_of(job)
        for length, start in self._starts.items():
            if control is not None and length <= control.window:
                continue  # there the control is the measurement itself
            cells[length] = {"metric": "perplexity", "data": data}
            if self.stride is not None and control is not None:
                cells[length]["protocol"] = {"name": CONTROL, **control.fields(), "sliding": self.stride, **more}
            elif self.stride is not None:
                cells[length]["protocol"] = {"name": "sliding", "stride": self.stride, **more}
            else:
                name = {"name": "truncate"} if control is None else {"name": CONTROL, **control.fields()}
                cells[length]["protocol"] = {**name, "bucket_start": start, **more}
                # Here, so that a row without a result has them too.
                cells[length] |= {"bucket": [start, length], "perplexity_bucket": None}
        return cells

    def control_of(self, job: ModelJob) -> Control | None:
        """The control of a job, if it is to be measured.

        Raises:
            ConfigError: as for `ControlRequest.of`.
        """
        if self.control is None:
            return None
        return self.control.of(job.scaling.original_max_position_embeddings, job.name)

    def passes(self, job: ModelJob, lengths: Sequence[int]) -> dict[int, list[int]]:
        if self.control is not None:
            return {max(lengths): list(lengths)}
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
        return sum(texts.positions(window) for window in windows_of(texts, length, self.stride, self.control_of(job)))

    def needs_model(self, job: ModelJob, length: int, yields: Sequence[int]) -> bool:
        self._found[job, length] = found = self._known(self._pass(job, length), yields)
        return len(found.sums) < len(self.prepare(job.model)[0].documents)

    def _known(self, one: ScoredPass, yields: Sequence[int]) -> PassResult:
        """The results that earlier runs have left, as the first process finds them."""
        return current().first(lambda: one.known(self._needed(yields)))

    def _needed(self, yields: Sequence[int]) -> set[int]:
        """The context lengths whose sums are needed for the rows of `yields`: these, and where their buckets begin."""
        if self.stride is not None:
            return set(yields)
        return {one for wanted in yields for one in (wanted, self._starts[wanted]) if one}

    # The losses of single tokens.

    def losses(self, job: ModelJob, length: int, pass_length: int | None = None) -> list[Losses]:
        """The kept losses of each truncated window cut to `length` positions, [length - 1] each.

        pass_length: the length of the pass that scored them; None: the one that scores all lengths of this evaluator.

        Raises:
            ConfigError: they are not in the folder of `save_nll`.
        """
        if pass_length is None:
            passes = self.passes(job, list(self.lengths))
            pass_length = next(one for one, yields in passes.items() if length in yields)
        found = self._pass(job, pass_length).losses(length)
        if found is None:
            raise ConfigError(f"losses of {job.name} at {length} tokens are not in {self.save_nll}")
        return found

    def unkept(self, job: ModelJob) -> list[int]:
        """The lengths whose losses are to be in the folder of `save_nll`, and are not all there."""
        if self.save_nll is None:
            return []
        passes = self.passes(job, list(self.cells(job)))
        return [wanted for one, yields in passes.items() if not self._pass(job, one).is_kept() for wanted in yields]

    def documents_of(self, model: str) -> list[int]:
        """The document of each truncated window, in the order of `losses`."""
        return [window.document for window in truncated(self.prepare(model)[0], self.lengths[-1])]

    # The passes.

    def _pass(self, job: ModelJob, length: int) -> ScoredPass:
        texts, data = self.prepare(job.model)
        control = self.control_of(job)
        if control is not None:
            context = f"last {control.window} {control.stride}"
        elif self.stride is not None:
            context = f"sliding {length} {self.stride}"
        else:
            context = f"at {length}" if is_length_dependent(job) else "all"
        # Sums of a control are by the windows that it controls.
        of = "" if control is None or self.stride is None else f" of {self.stride}"
        return ScoredPass(
            texts,
            length,
            [one for one in self.lengths if one <= length],
            self.stride,
            context,
            row_key({**job.fields(), "metric": "nats", "data": data, "protocol": context + of}),
            self.parts,
            self._folder(job),
            control,
        )

    def _folder(self, job: ModelJob) -> LossFolder | None:
        if self.save_nll is None:
            return None
        key = row_key({field: job.fields()[field] for field in ("model_fingerprint", "dtype", "scaling")})
        name = f"{display_name(job.model)} {job.label}".replace("/", "_").replace(" ", "_")
        return LossFolder(self.save_nll, f"{name}-{key[:8]}")

    def measure(
        self, model: Any, job: ModelJob, length: int, yields: Sequence[int], advance: Callable[[int], object]
    ) -> Iterator[tuple[int, Row]]:
        one = self._pass(job, length)
        done = self._found.pop((job, length), None) or self._known(one, yields)
        self._complete(model, one, done, advance)
        ordered = {index: done.sums[index] for index in one.by_document}
        for wanted in yields:
            if self.stride is None:
                row = truncated_row(ordered, wanted, self._starts[wanted], self.weighting)
            else:
                row = sliding_row(ordered, one.measured(wanted), wanted, self.weighting)
            yield wanted, {**row, **cost_fields(done, length)}
        if current().is_first:
            self.parts.discard(one.key)

    def _complete(self, model: Any, one: ScoredPass, done: PassResult, advance: Callable[[int], object]) -> None:
        """Score the documents whose sums `done` lacks, and add these to it. Each process scores some of them."""
        ranks = current()
        if ranks.count == 1:
            done.add(self._score(model, one, set(one.by_document) - set(done.sums), one.windows, advance))
            return
        left = [index for index in one.by_document if index not in done.sums]
        share = shares(left, [self._positions(one, index) for index in left], ranks.count)[ranks.rank]
        mine = [window for window in one.windows if window.document in share]
        # The bar of the first process stands for all, and for what is known already.
        counted, all_positions = [0, 0], sum(one.texts.positions(window) for window in one.windows)
        own = sum(one.texts.positions(window) for window in mine)

        def stand_in(positions: int) -> None:
            counted[0] += positions
            advance(all_positions * counted[0] // own - counted[1])
            counted[1] = all_positions * counted[0] // own

        found = ranks.gather(lambda: self._score(model, one, set(share), mine, stand_in))
        seconds = max(result.seconds for result in found)
        for result in found:
            done.add(replace(result, seconds=0.0))
        done.seconds += seconds
        advance(all_positions - counted[1])

    def _positions(self, one: ScoredPass, index: int) -> int:
        """The positions of all windows of a document."""
        return sum(one.texts.positions(window) for window in one.by_document[index])

    def _score(
        self,
        model: Any,
        one: ScoredPass,
        missing: set[int],
        windows: Sequence[Window],
        advance: Callable[[int], object],
    ) -> PassResult:
        """Score documents, all of whose windows are among `windows`; those of others are passed over."""
        processes, done = current().count, PassResult()
        texts, limit, unsaved = one.texts, self.rows_per_pass(one.positions), PassResult()
        losses: dict[int, list[Losses]] = {index: [] for index in one.by_document if index in missing}
        for batch in batches(windows, lambda window: self.rows_per_pass(texts.positions(window))):
            count = sum(texts.positions(window) for window in batch)
            wanted = [window.document in losses for window in batch]
            if any(wanted):
                served = isinstance(model, ServedModel)
                with Meter(*((model.device,) if served else computing_devices(model))) as meter:
                    limit, scored = score_windows(model, texts, batch, limit, self.prefill_chunk)
                finished: dict[int, Sums] = {}
                for window, keep, nll in zip(batch, wanted, scored, strict=True):
                    if not keep:
                        continue
                    index = window.document
                    losses[index].append(nll)
                    if len(losses[index]) == len(one.by_document[index]):
                        finished[index] = one.finish(index, losses.pop(index))
                unsaved.add(PassResult(finished, meter.seconds, count, meter.peak_memory))
                if finished:
                    done.add(unsaved)
                    if (losses or processes > 1) and not one.folder:  # with no document left the rows follow at once
                        cost = replace(unsaved, seconds=unsaved.seconds / processes)  # the others work meanwhile
                        self.parts.add(one.key, finished, **cost.cost())
                    unsaved = PassResult()
            advance(count)
        return done


def shares(items: Sequence[int], sizes: Sequence[int], count: int) -> list[list[int]]:
    """Share out items so that all shares have about the same size: each, the largest first, goes to the smallest."""
    found: list[list[int]] = [[] for _ in range(count)]
    totals = [0] * count
    for item, size in sorted(zip(items, sizes, strict=True), key=lambda pair: -pair[1]):
        smallest = totals.index(min(totals))
        found[smallest].append(item)
        totals[smallest] += size
    return found


def score_windows(
    model: Any, texts: Texts, batch: Sequence[Window], limit: int, prefill_chunk: int | None = None
) -> tuple[int, list[Losses]]:
    """Compute the losses of each window's scored tokens, `limit` windows at a time, or fewer if memory demands it.

    batch: windows of one shape.

    Returns:
        The number of windows that fitted, and the losses [scored] of each window in nats, float32.
    """
    rows = torch.from_numpy(np.stack([texts.ids(window) for window in batch]))
    if isinstance(model, ServedModel):
        return limit, model.losses(rows.tolist(), batch[0].scored)
    start = rows.shape[1] - 1 - batch[0].scored
    scored: list[Losses] = []
    while len(scored) < len(batch):
        part = rows[len(scored) : len(scored) + limit].to(input_device(model))
        targets = torch.full_like(part, IGNORE)
        targets[:, :-1] = part[:, 1:]
        try:
            with torch.inference_mode():
                nll = token_nll(model, part, targets, start=start, prefill_chunk=prefill_chunk)
                scored += list(nll[:, :-1].float().cpu().numpy())
            continue
        except Exception as error:
            if not is_out_of_memory(error) or len(part) == 1:
                raise
        limit = len(part) // 2
        release_memory()
    return limit, scored
