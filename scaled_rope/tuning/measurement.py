"""Measurements of one model under many scalings: windows of text, answers to questions, each a row that is kept."""

from __future__ import annotations

import argparse
import hashlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch.nn import functional

from scaled_rope.checkpoint import encode, load_config, load_tokenizer
from scaled_rope.errors import ConfigError
from scaled_rope.evaluation.jobs import ModelJob, ModelLoader
from scaled_rope.evaluation.passkey_prompts import PasskeyPrompt
from scaled_rope.evaluation.windows import tell_copies
from scaled_rope.patching.loss import IGNORE, hidden_states, project, token_nll
from scaled_rope.results import Row, append_row, row_key, rows_so_far
from scaled_rope.scaling.hf_config import text_config
from scaled_rope.scaling.record import RopeScaling
from scaled_rope.texts.corpora import CORPORA, fetch
from scaled_rope.texts.documents import read_documents
from scaled_rope.texts.packed import open_rows
from scaled_rope.texts.token_documents import is_tokenized, row_documents
from scaled_rope.texts.vocabulary import check_tokenizer
from scaled_rope.tuning.curves import Floats, segment_sums

Tokens = npt.NDArray[np.int64]
Score = Callable[[RopeScaling, Tokens], npt.NDArray[Any]]
"""Nats of tokens 1 … n-1 of a window of n tokens under a scaling."""
ScoreUnder = Callable[[RopeScaling], Callable[[Tokens], npt.NDArray[Any]]]
"""A `Score` in two steps: bring a scaling into the model, then score windows under it."""
Ask = Callable[[RopeScaling, PasskeyPrompt], tuple[float, bool]]
"""Nats of the right answer to a prompt under a scaling, and whether greedy decoding would give it."""
METRIC = "segment_nll"
ANSWER_METRIC = "answer_nll"
REFERENCES = 8
"""Prompts within L that show whether the model retrieves at all."""
LEAST_FOUND = 0.5
"""Mean probability of answers within L, unscaled, below which retrieval is left out: the model does not retrieve."""


# ------------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True)
class ScoredWindow:
    """A piece of a document, as long as the largest factor needs."""

    document: int
    """Number of the document in the source, from 0."""
    start: int
    """Index of its first token in the document."""
    tokens: Tokens
    """[n], the BOS included."""


def documents(args: argparse.Namespace, tokenizer: Any, unused: bool) -> Iterator[Tokens]:
    """Yield the token ids of each document, without special tokens; of packed sets, each row without padding.

    unused: take the part of a corpus that no test uses, that for training; else the first one that is held out.
    """
    source = args.dataset
    if source in CORPORA and not Path(source).exists():
        part = "train" if unused else CORPORA[source].heldout
        source = str(fetch(source, Path("data/cache") / source) / part)
    if is_tokenized(source):
        rows = open_rows(source, args.split)
        check_tokenizer(rows, source, tokenizer, "the model")
        yield from row_documents(rows, source)
    else:
        for text in read_documents(source, args.feature, args.split):
            yield np.asarray(encode(tokenizer, text), dtype=np.int64)


def cut_windows(
    source: Iterator[Tokens],
    length: int,
    bos: int | None,
    wanted: int | None,
    each: int,
    hint: str = "smaller --factors need less",
    most: int | None = None,
    name: str = "",
) -> list[ScoredWindow]:
    """Cut windows of `length` tokens from the first `wanted` documents that are long enough; None: from all.

    A document yields at most `each` windows, which do not overlap and begin at equal distances, the first at its start.
    Their starts depend on `length` only if there is no room for so many, so a rerun with other factors mostly reuses
    earlier results. A document that is a copy of an earlier one is left out, and `tell_copies` says so of the data set
    `name`.

    hint: what a user can do about documents that are too short; most: windows after which no more are read.

    Raises:
        ConfigError: fewer documents are long enough than are wanted, or none is.
    """
    windows: list[ScoredWindow] = []
    head = [] if bos is None else [bos]
    body = length - len(head)
    used = read = 0
    seen: dict[bytes, int] = {}
    copies: list[tuple[int, int]] = []
    for tokens in source:
        read += 1
        if len(tokens) and tokens[0] == bos:  # a packed row brings its own BOS; every window gets one
            tokens = tokens[1:]
        if len(tokens) < body:
            continue
        if (earlier := seen.setdefault(hashlib.sha256(tokens.astype(np.int64).tobytes()).digest(), read)) != read:
            copies.append((read, earlier))
            continue
        count = min(each, len(tokens) // body)
        for start in [index * (len(tokens) // count) for index in range(count)]:
            piece = np.concatenate([np.asarray(head, dtype=np.int64), tokens[start : start + body]])
            windows.append(ScoredWindow(read - 1, start, piece))
        used += 1
        if used == wanted or (most is not None and len(windows) >= most):
            break
    tell_copies(name, tuple(copies))
    if not used or (wanted is not None and used < wanted):
        asked = "at least 1 is needed" if wanted is None else f"--documents asks for {wanted}"
        raise ConfigError(f"only {used} of {read} documents have {length} tokens; {asked}: {hint}")
    return windows


def read_windows(
    args: argparse.Namespace, job: ModelJob, length: int, unused: bool = False, **more: Any
) -> list[ScoredWindow]:
    """The windows that the flags ask for.

    unused: as for `documents`; more: as for `cut_windows`.

    Raises:
        ConfigError: as `cut_windows` does; tokens that the model does not have.
    """
    tokenizer = load_tokenizer(job.model)
    source = documents(args, tokenizer, unused)
    windows = cut_windows(
        source, length, tokenizer.bos_token_id, args.documents, args.windows, name=args.dataset or "", **more
    )
    vocabulary = text_config(load_config(job.model)).vocab_size
    if (largest := max(window.tokens.max() for window in windows)) >= vocabulary:
        raise ConfigError(f"token id {largest} does not fit model {job.model!r} with a vocabulary of {vocabulary}")
    return windows


def check_target(original: int | None, target: int, name: str) -> int:
    """L, where the target lies beyond it.

    Raises:
        ConfigError: L is not known or below 2, or the target is not beyond it.
    """
    if original is None:
        raise ConfigError(
            f"the trained length of {name} is not known; say --original-max-position-embeddings N, in tokens"
        )
    if original < 2:
        raise ConfigError(
            f"original_max_position_embeddings={original}: must be at least 2, a segment's length in tokens"
        )
    if target <= original:
        raise ConfigError(
            f"--target {target} is not allowed; {name} reads {original} tokens as it is, so more than {original}"
        )
    return original


# --------------------------------------------------------------------------------------------------------- measurement


class RowStore:
    """Results in a file of rows; what the file holds already is not measured again."""

    def __init__(self, path: Path, record: Row, bar: Any) -> None:
        """record: the provenance of new rows; bar: counts the tokens that are read."""
        self.path, self.bar, self._record = path, bar, record
        self._rows = {row_key(row): row for row in rows_so_far(path)}

    def missing(self, cells: Sequence[Row]) -> int:
        """The number of tokens that are still to be read; equal cells count once."""
        lengths = {row_key(cell): cell["length"] for cell in cells}
        return sum(length for key, length in lengths.items() if key not in self._rows)

    def find(self, cell: Row) -> Row | None:
        """The row with the identity of `cell`, if it was measured."""
        return self._rows.get(row_key(cell))

    def get(self, cell: Row, title: str, measure: Callable[[], Row]) -> Row:
        """The row with the identity of `cell`; `measure` gives the fields of one that is new."""
        key = row_key(cell)
        if key not in self._rows:
            self.bar.set_description(title)
            row = {**cell, **measure()}
            append_row(self.path, {**row, "provenance": self._record}, once=True)
            self._rows[key] = row
            self.bar.update(cell["length"])
        return self._rows[key]


def _fingerprint(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def _title(scaling: RopeScaling) -> str:
    if scaling.method != "yarn":
        return scaling.label
    fast, slow = scaling.ramp_bounds
    return f"x{scaling.factor:g}, β {fast:g} {slow:g}, √(1/t) {scaling.static_attention_factor:.4g}"


class Sweep:
    """Scores windows under scalings, each pair once."""

    def __init__(
        self,
        store: RowStore,
        windows: Sequence[ScoredWindow],
        segment: int,
        identity: Row,
        score: Score,
        length: int | None = None,
        protocol: Row | None = None,
    ) -> None:
        """segment: tokens of a segment; identity: a row's fields about model and text, see `results.IDENTITY`.

        length: tokens of a window that are scored; None: as many as the scaling is for.
        protocol: what a row's protocol says besides the segments.
        """
        self.store, self.windows, self.segment, self.score = store, windows, segment, score
        self._identity, self._length, self._protocol = identity, length, protocol or {}

    def _cell(self, scaling: RopeScaling, window: ScoredWindow) -> tuple[Tokens, Row]:
        """The tokens to score, and the fields that identify the result."""
        length = self._length or scaling.max_position_embeddings
        assert length is not None  # "yarn" needs the original length
        tokens = window.tokens[:length]
        return tokens, {
            "metric": METRIC,
            **self._identity,
            "scaling": scaling.to_dict(),
            "label": scaling.label,
            "data": {**self._identity["data"], "fingerprint": _fingerprint(tokens)},
            "protocol": {"name": "segments", "segment": self.segment, **self._protocol},
            "length": length,
        }

    def cells(self, scalings: Sequence[RopeScaling], windows: Sequence[ScoredWindow] | None = None) -> list[Row]:
        """The fields that identify each result."""
        chosen = self.windows if windows is None else windows
        return [self._cell(scaling, window)[1] for window in chosen for scaling in scalings]

    def measure(self, scalings: Sequence[RopeScaling], windows: Sequence[ScoredWindow] | None = None) -> Floats:
        """Mean nats per token [scalings, windows, segments] of scalings with one factor.

        windows: some of the sweep's; None: all of them.
        """
        bar, chosen = self.store.bar, self.windows if windows is None else windows
        bar.total = max(bar.total or 0, bar.n + self.store.missing(self.cells(scalings, chosen)))
        by_window = np.array([[self._one(scaling, window) for scaling in scalings] for window in chosen])
        means: Floats = rearrange(by_window, "window scaling segment -> scaling window segment")
        return means

    def _one(self, scaling: RopeScaling, window: ScoredWindow) -> list[float]:
        tokens, cell = self._cell(scaling, window)

        def measure() -> Row:
            nll = self.score(scaling, tokens)
            if not np.isfinite(nll).all():
                raise ConfigError(f"dtype {cell.get('dtype')!r}: {scaling.label} gives losses that are not finite")
            sums, targets = segment_sums(nll, self.segment)
            return {"document": window.document, "start": window.start, "nll": sums, "targets": targets}

        found = self.store.get(cell, _title(scaling), measure)
        return [nats / count for nats, count in zip(found["nll"], found["targets"], strict=True)]


@dataclass(frozen=True)
class Answer:
    """How a model answers one prompt."""

    probability: float
    """Of a token of the right answer, their geometric mean: 1 when the model is sure of all of them."""
    right: bool
    """Whether greedy decoding would give the answer."""


def reference_retrieval(asked: Sequence[Answer]) -> tuple[float, int, bool]:
    """Whether a model finds facts at all, from its answers within L, unscaled or as it is.

    Returns:
        The mean probability of an answer's tokens; the number of right answers; and whether the model finds what it is
        asked for. Where it does not, retrieval can show nothing of any scaling.
    """
    probability = sum(one.probability for one in asked) / len(asked)
    return probability, sum(one.right for one in asked), probability >= LEAST_FOUND


class Answers:
    """Asks prompts under scalings, each pair once."""

    def __init__(self, store: RowStore, identity: Row, ask: Ask) -> None:
        """identity: a row's fields about the model, see `results.IDENTITY`."""
        self.store, self.ask, self._identity = store, ask, identity

    def _cell(self, scaling: RopeScaling, prompt: PasskeyPrompt) -> Row:
        tokens = np.asarray(prompt.input_ids + prompt.answer_ids, dtype=np.int64)
        return {
            "metric": ANSWER_METRIC,
            **self._identity,
            "scaling": scaling.to_dict(),
            "label": scaling.label,
            "data": {"name": "hidden facts", "fingerprint": _fingerprint(tokens)},
            "protocol": {"name": "teacher-forced"},
            "length": prompt.length,
        }

    def cells(self, scalings: Sequence[RopeScaling], prompts: Sequence[PasskeyPrompt]) -> list[Row]:
        """The fields that identify each result."""
        return [self._cell(scaling, prompt) for prompt in prompts for scaling in scalings]

    def measure(self, scaling: RopeScaling, prompts: Sequence[PasskeyPrompt]) -> list[Answer]:
        """The answer to each prompt."""
        return [self._one(scaling, prompt) for prompt in prompts]

    def _one(self, scaling: RopeScaling, prompt: PasskeyPrompt) -> Answer:
        cell = self._cell(scaling, prompt)

        def measure() -> Row:
            nats, right = self.ask(scaling, prompt)
            if not math.isfinite(nats):
                raise ConfigError(f"dtype {cell.get('dtype')!r}: {scaling.label} gives losses that are not finite")
            place = {"key": prompt.key, "depth": round(prompt.depth, 4), "distance": prompt.distance}
            return {**place, "nll": round(nats, 6), "targets": len(prompt.answer_ids), "right": right}

        found = self.store.get(cell, _title(scaling), measure)
        return Answer(math.exp(-found["nll"] / found["targets"]), found["right"])


def _scaled(load: ModelLoader, job: ModelJob, scaling: RopeScaling) -> Any:
    """The job's model under a scaling. The weights are read at the first call; later calls only change the scaling."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # patch_model's warnings are the same for every scaling
        return load(replace(job, spec="", scaling=scaling, carried=False))


def model_score(load: ModelLoader, job: ModelJob) -> Score:
    """A `Score` by forward passes of a model."""

    under = model_score_under(load, job)
    return lambda scaling, tokens: under(scaling)(tokens)


def model_score_under(load: ModelLoader, job: ModelJob) -> ScoreUnder:
    """A `ScoreUnder` by forward passes of a model."""

    def under(scaling: RopeScaling) -> Callable[[Tokens], npt.NDArray[Any]]:
        model = _scaled(load, job, scaling)

        def score(tokens: Tokens) -> npt.NDArray[Any]:
            ids = torch.from_numpy(tokens)[None].to(model.device)
            targets = torch.full_like(ids, IGNORE)
            targets[:, :-1] = ids[:, 1:]
            with torch.inference_mode():
                nll: npt.NDArray[Any] = token_nll(model, ids, targets)[0, :-1].cpu().numpy()
            return nll

        return score

    return under


def model_ask(load: ModelLoader, job: ModelJob) -> Ask:
    """An `Ask` by forward passes of a model, one per prompt; only the answer's positions are projected."""

    def ask(scaling: RopeScaling, prompt: PasskeyPrompt) -> tuple[float, bool]:
        model = _scaled(load, job, scaling)
        ids = torch.tensor([prompt.input_ids + prompt.answer_ids], device=model.device)
        first = len(prompt.input_ids)
        with torch.inference_mode():
            # Position t predicts token t+1, so the last token is never an input.
            logits = project(model, hidden_states(model, ids[:, :-1])[0, first - 1 :])
            answer = ids[0, first:].to(logits.device)
            nats = functional.cross_entropy(logits, answer, reduction="sum")
            return float(nats), bool((logits.argmax(dim=-1) == answer).all())

    return ask
